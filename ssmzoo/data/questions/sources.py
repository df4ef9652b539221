"""Pictures with questions: the digits that scikit-learn ships, or a folder with a list.

questions.jsonl   one JSON object per line: {"image": "a.png", "question": "what is it?", "answer": "a cat",
                  "caption": "a cat on a mat."}; the caption may be left out, and is the answer then
a.png ...         pictures, made grey or RGB and resized to one size
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ASKED = {  # about a digit: what is asked, and the answer
    "digit": ("which digit?", lambda d: WORDS[d]),
    "even": ("even?", lambda d: ("yes", "no")[d % 2]),
    "large": ("larger than four?", lambda d: ("no", "yes")[d > 4]),
}
LIST = "questions.jsonl"


class Asked(NamedTuple):
    """One question about a picture; kind numbers the questions that are reported apart."""

    picture: int
    question: str
    answer: str
    caption: str
    kind: int


class Source(NamedTuple):
    """pictures (n y x c) float32 in [0, 1], what is asked about them, and the names of the kinds of questions."""

    name: str
    pictures: np.ndarray
    asked: list[Asked]
    kinds: list[str]


def digits() -> Source:
    """The 1,797 handwritten digits (8 x 8) that ship with scikit-learn: which it is, even, larger than four."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ValueError(
            "the digits need scikit-learn (pip install scikit-learn), or give data.path=<folder of your own>"
        ) from None
    found = load_digits()
    pictures = (found.images / 16).astype(np.float32)[..., None]
    asked = [
        Asked(i, question, answer(int(d)), f"it is {WORDS[d]}.", kind)
        for i, d in enumerate(found.target)
        for kind, (question, answer) in enumerate(ASKED.values())
    ]
    return Source("scikit-learn's digits", pictures, asked, list(ASKED))


def folder(path: str, size: int, channels: int) -> Source:
    """A folder of one's own, pictures resized to size x size. Raises ValueError that names file and line."""
    root = Path(path).expanduser()
    file = root / LIST
    if not file.is_file():
        raise ValueError(f"data.path = {path}: there is no {LIST} in it")
    names: dict[str, int] = {}
    rows: list[tuple[int, str, str, str]] = []
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text: {error}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        image, question, answer, caption = _row(line, f"{file}, line {number}")
        rows.append((names.setdefault(image, len(names)), question, answer, caption))
    if len(names) < 2:
        raise ValueError(f"{file} asks about {len(names)} pictures; two are needed, one of them to judge by")
    pictures = np.stack([_picture(root / name, size, channels) for name in names])
    kinds = list(dict.fromkeys(question for _, question, _, _ in rows))
    if len(kinds) > 12:  # free questions are counted together
        return Source(str(path), pictures, [Asked(*row, 0) for row in rows], ["all"])
    return Source(str(path), pictures, [Asked(*row, kinds.index(row[1])) for row in rows], kinds)


def _row(line: str, where: str) -> tuple[str, str, str, str]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: no JSON object ({error})") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected an object with image, question and answer, got {type(row).__name__}")
    for key in ("image", "question", "answer"):
        if not isinstance(row.get(key), str) or not row[key].strip():
            raise ValueError(f"{where}: {key} is {row.get(key)!r}; expected a text")
    caption = row.get("caption", row["answer"])
    texts = [" ".join(str(text).split()) for text in (row["question"], row["answer"], caption)]
    return row["image"], *texts


def _picture(file: Path, size: int, channels: int) -> np.ndarray:
    """(size size c) float32 in [0, 1]"""
    from ssmzoo.data.image_file import read_picture

    image = read_picture(file).image8().convert("L" if channels == 1 else "RGB")
    levels = np.asarray(image.resize((size, size), resample=3), dtype=np.float32) / 255  # 3: bicubic
    return levels.reshape(size, size, channels)
