"""Questions about pictures as a LightningDataModule: bytes of text, patches of pixels."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import Dataset

from ssmzoo.data.loader import Draw, ResumableLoader, refuse_other_data
from ssmzoo.data.questions.sources import Asked, Source, digits, folder
from ssmzoo.suggest import nearest

IGNORE = -100  # label of a position that is not asked for
END = "\n"  # stands in front of every text and behind it


def patches(pictures: np.ndarray, size: int) -> Tensor:
    """(n y x c) -> visual tokens (n m size*size*c), row by row."""
    n, y, x, c = pictures.shape
    cut = pictures.reshape(n, y // size, size, x // size, size, c).transpose(0, 1, 3, 2, 4, 5)
    return torch.from_numpy(np.ascontiguousarray(cut.reshape(n, -1, size * size * c)))


def coded(prompt: str, answer: str, length: int) -> tuple[Tensor, Tensor]:
    """Bytes (l) of END + prompt + answer + END and their labels, the next bytes where they belong to the answer."""
    before, whole = (len((END + prompt).encode()), (END + prompt + answer + END).encode())
    ids = torch.full((length,), ord(END))
    labels = torch.full((length,), IGNORE)
    ids[: len(whole) - 1] = torch.tensor(list(whole[:-1]))
    labels[before - 1 : len(whole) - 1] = torch.tensor(list(whole[before:]))
    return ids, labels


class Questions(Dataset):
    """{"input_ids", "labels" (l), "caption_ids", "caption_labels" (k), "visual" (m w), "kind" ()} of every question."""

    def __init__(self, asked: list[Asked], visual: Tensor, lengths: tuple[int, int]):
        self.asked, self.visual, self.lengths = asked, visual, lengths

    def __len__(self) -> int:
        return len(self.asked)

    def __getitem__(self, draw: Draw) -> dict[str, Tensor]:
        one = self.asked[draw.index]
        ids, labels = coded(f"{one.question} ", one.answer, self.lengths[0])
        caption, next_bytes = coded("", one.caption, self.lengths[1])
        visual = self.visual[one.picture]
        return {"input_ids": ids, "labels": labels, "caption_ids": caption, "caption_labels": next_bytes,
                "visual": visual, "kind": torch.tensor(one.kind)}  # fmt: skip


class QuestionData(LightningDataModule):
    """Questions about pictures, which are cut into patches of pixels: visual tokens without an encoder.

    path          folder with questions.jsonl and pictures (sources.py); None: scikit-learn's digits
    image_size, channels   what pictures of a folder are resized to; 1 (grey) or 3
    patch         width and height of a visual token in pixels
    questions     names of those that are asked when training; None: all
    unseen        names of further ones, which are asked of held-out pictures alone
    val_fraction  share of the pictures that are held out
    batch_size, seed

    A batch is {"input_ids", "labels" (b l), "caption_ids", "caption_labels" (b k), "visual" (b m w), "kind" (b)}.
    """

    default_task = "questions"

    def __init__(
        self,
        path: str | None = None,
        image_size: int = 32,
        channels: int = 1,
        patch: int = 4,
        questions: list[str] | None = None,
        unseen: list[str] | None = None,
        val_fraction: float = 0.2,
        batch_size: int = 64,
        seed: int = 0,
    ):
        super().__init__()
        for name, value in {"patch": patch, "batch_size": batch_size, "image_size": image_size}.items():
            if value < 1:
                raise ValueError(f"data.{name} = {value}; it must be at least 1")
        if channels not in (1, 3) or not 0 < val_fraction < 1:
            raise ValueError(
                f"data.channels = {channels} must be 1 or 3, data.val_fraction = {val_fraction} between 0 and 1"
            )
        self.path, self.image_size, self.channels, self.patch = path, image_size, channels, patch
        self.chosen, self.unseen, self.val_fraction = questions, list(unseen or []), val_fraction
        self.batch_size, self.seed = batch_size, seed
        self.source: Source | None = None

    def setup(self, stage: str | None = None) -> None:
        if self.source is not None:
            return
        source = digits() if self.path is None else folder(self.path, self.image_size, self.channels)
        side = source.pictures.shape[1]
        if side % self.patch:
            raise ValueError(f"data.patch = {self.patch} does not divide the pictures' {side} pixels")
        trained = self._trained(source.kinds)
        held = max(1, round(self.val_fraction * len(source.pictures)))
        if held >= len(source.pictures):
            raise ValueError(f"{len(source.pictures)} pictures leave none to train on: lower data.val_fraction")
        out = set(np.random.default_rng(self.seed).permutation(len(source.pictures))[:held].tolist())
        known = {*trained, *(source.kinds.index(name) for name in self.unseen)}
        self.training = [a for a in source.asked if a.kind in trained and a.picture not in out]
        self.held_out = [a for a in source.asked if a.kind in known and a.picture in out]
        self.text = [a for a in source.asked if a.picture not in out]  # what the decoder reads, unseen kinds as well
        self.visual = patches(source.pictures, self.patch)
        self.source = source
        if not self.training or not self.held_out:
            raise ValueError("no question is left to train on, or none about held-out pictures: see data.questions")

    def _trained(self, kinds: list[str]) -> set[int]:
        for name in (*(self.chosen or ()), *self.unseen):
            if name not in kinds:
                raise ValueError(f"data: no question is called {name!r}{nearest(name, kinds)}; there are {kinds}")
        if both := set(self.chosen or ()).intersection(self.unseen):
            raise ValueError(
                f"data.questions and data.unseen both name {', '.join(sorted(both))}; expected one of them"
            )
        names = [k for k in kinds if k not in self.unseen] if self.chosen is None else self.chosen
        return {kinds.index(name) for name in names}

    @property
    def lengths(self) -> tuple[int, int]:
        """Bytes of the longest question with its answer, and of the longest caption."""
        both = [len(f"{END}{a.question} {a.answer}".encode()) for a in self.source.asked]
        return max(both), max(len(f"{END}{a.caption}".encode()) for a in self.source.asked)

    @property
    def sizes(self) -> dict[str, int]:
        return {"vocab_size": 256, "visual_dim": self.visual.shape[-1]}

    def describe(self) -> dict:
        digest = hashlib.sha256(self.source.pictures.tobytes() + repr(self.source.asked).encode()).hexdigest()
        trained = sorted({self.source.kinds[a.kind] for a in self.training})
        return {"questions": self.source.name, "asked": ", ".join(trained), "sha256": digest, "patch": self.patch}

    state_dict = describe

    def load_state_dict(self, state: dict) -> None:
        refuse_other_data(self, state)

    def train_dataloader(self) -> ResumableLoader:
        return self._loader(self.training, shuffle=True, drop_last=len(self.training) >= self.batch_size)

    def val_dataloader(self) -> ResumableLoader:
        return self._loader(self.held_out)

    def _loader(self, asked: list[Asked], **more) -> ResumableLoader:
        trainer = self.trainer
        rank, world = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
        data = Questions(asked, self.visual, self.lengths)
        return ResumableLoader(data, self.batch_size, seed=self.seed, rank=rank, world_size=world, **more)

    def text_batch(self, size: int, draw: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Bytes (size l) and the next ones, of texts that a decoder without eyes learns from: a caption (half of the
        time), a question about it, the answer; about training pictures alone."""
        length, caption = self.lengths
        rows = []
        for i in draw.integers(len(self.text), size=size):
            one = self.text[int(i)]
            front = f"{one.caption} " if draw.random() < 0.5 else ""
            rows.append(coded("", f"{front}{one.question} {one.answer}", length + caption))
        return torch.stack([ids for ids, _ in rows]), torch.stack([labels for _, labels in rows])

    def baselines(self) -> dict[str, float]:
        """Share of right answers about held-out pictures, by name: the most frequent answer of every question, and a
        logistic regression on the pixels for every question that was trained."""
        frequent, pixels = [], []
        for kind in sorted({a.kind for a in self.training}):
            seen = [a for a in self.training if a.kind == kind]
            asked = [a for a in self.held_out if a.kind == kind]
            answers = [a.answer for a in seen]
            most = max(sorted(set(answers)), key=answers.count)
            frequent += [a.answer == most for a in asked]
            pixels += [said == a.answer for said, a in zip(self._regression(seen, asked, most), asked)]
        found = {"most frequent answer": float(np.mean(frequent))} if frequent else {}
        return found | ({"logistic regression on pixels": float(np.mean(pixels))} if pixels else {})

    def _regression(self, seen: list[Asked], asked: list[Asked], most: str) -> list[str]:
        try:
            from sklearn.linear_model import LogisticRegression
        except ImportError:
            return []
        if len({a.answer for a in seen}) < 2 or not asked:
            return [most] * len(asked)
        flat = self.visual.flatten(1).numpy()
        model = LogisticRegression(max_iter=300).fit(flat[[a.picture for a in seen]], [a.answer for a in seen])
        return list(model.predict(flat[[a.picture for a in asked]]))
