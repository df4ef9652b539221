"""The experiments of the generalisation bound: one S6 layer learns which symbol comes more often, or prose from code.

T length of the strings. `excerpts` stands where the paper has reviews of films: real text of which T bytes are read.
Source: as in generalization_bound.py.
"""

from __future__ import annotations

import sysconfig
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ssmzoo.probes.free_a_ssm import FreeAClassifier
from ssmzoo.probes.generalization_bound import constants, decay_rate, length_factor


def majority(samples: int, T: int, generator: torch.Generator, noise: float = 0.0) -> tuple[Tensor, Tensor]:
    """Strings (samples T) of 0 and 1, the number of ones uniform in 0..T; label 1 where they exceed T / 2.

    noise  share of the ones that is set to zero after labelling (0.25 in the published training data)
    """
    ones = torch.randint(0, T + 1, (samples, 1), generator=generator)
    ids = (torch.rand(samples, T, generator=generator).argsort(1) < ones).long()
    label = (ones[:, 0] > T / 2).float()
    return ids * (torch.rand(samples, T, generator=generator) >= noise), label


@cache
def prose_and_code() -> tuple[Tensor, Tensor]:
    """Bytes (0 to 127) of the running Python's reference manual, as pydoc has it, and of its largest modules."""
    root = Path(sysconfig.get_paths()["stdlib"])
    modules = ("argparse", "datetime", "doctest", "inspect", "pickle", "tarfile", "turtle", "typing")
    texts = (root / "pydoc_data" / "topics.py").read_bytes(), b"".join((root / f"{m}.py").read_bytes() for m in modules)
    return tuple(torch.frombuffer(bytearray(text), dtype=torch.uint8).long().clamp(max=127) for text in texts)


def excerpts(samples: int, T: int, generator: torch.Generator, held_out: bool = False) -> tuple[Tensor, Tensor]:
    """Bytes (samples T) from the first four fifths of prose or code, or from the last fifth; label 1: prose."""
    label, rows = torch.randint(0, 2, (samples,), generator=generator), []
    for is_prose in label.tolist():
        text = prose_and_code()[0 if is_prose else 1]
        cut = 4 * len(text) // 5
        low, high = (cut, len(text)) if held_out else (0, cut)
        start = int(torch.randint(low, high - T, (1,), generator=generator))
        rows.append(text[start : start + T])
    return torch.stack(rows), label.float()


TASKS = {  # name: (number of symbols, training strings, test strings)
    "majority": (2, lambda m, T, g: majority(m, T, g, noise=0.25), majority),
    "prose": (128, excerpts, lambda m, T, g: excerpts(m, T, g, held_out=True)),
}


class GapPoint(NamedTuple):
    """T | training and test accuracy (%), test loss minus training loss (nats) | s_A, rho_A after training | surrogate
    G_T / sqrt(samples) | s_A after every epoch."""

    T: int
    train: float
    test: float
    gap: float
    s_A: float
    rho: float
    surrogate: float
    s_A_path: list[float]


def train_majority(
    T: int,
    s_A: float = 0.0,
    epochs: int = 10,
    samples: int = 1000,
    batch: int = 64,
    seed: int = 0,
    d_model: int = 4,
    d_state: int = 4,
    task: str = "majority",
) -> GapPoint:
    """The paper's experiment on majority strings, or on those of another of TASKS: Adam 1e-2, weight decay 1e-5,
    gradients cut at norm 5, rate x 0.9 on a plateau, and a penalty while the answers of a batch hardly differ."""
    if task not in TASKS:
        raise ValueError(f"task is {task!r}; expected one of {', '.join(TASKS)}")
    symbols, training, testing = TASKS[task]
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = FreeAClassifier(symbols, d_model, d_state, s_A)
    train, test = training(samples, T, generator), testing(samples, T, generator)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, weight_decay=1e-5)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.9, patience=5, threshold=0.01)
    path = []
    for _ in range(epochs):
        total = 0.0
        for rows in torch.randperm(samples, generator=generator).split(batch):
            logits = model(train[0][rows])[0]
            loss = nn.functional.binary_cross_entropy_with_logits(logits, train[1][rows])
            if len(rows) > 1:
                loss = loss + (10 * (0.1 - logits.sigmoid().std())).clamp(min=0)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            total += loss.item() * len(rows)
        schedule.step(total / samples)
        path.append(float(model.ssm.A.detach().max()))
    with torch.no_grad():
        found = [(model(ids)[0], label) for ids, label in (train, test)]
    accuracy = [100 * float(((logits > 0) == (label > 0)).double().mean()) for logits, label in found]
    losses = [float(nn.functional.binary_cross_entropy_with_logits(logits, label)) for logits, label in found]
    c = constants(model.ssm, model.embedding.weight)
    rho = decay_rate(c["s_A"], model.ssm.p_delta.item(), c["B_q"], c["B_u"])
    surrogate = float(length_factor(rho, torch.tensor([T]))[0]) / samples**0.5
    return GapPoint(T, *accuracy, losses[1] - losses[0], c["s_A"], rho, surrogate, path)
