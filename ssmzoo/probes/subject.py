"""What a probe is given and what it hands back; every file of this folder with a `probe(subject)` is a probe.

finding = hidden_attention.probe(Subject(model, ids, labels=list("some text")))
finding.write("out", title="hidden attention")      # summary.md, one CSV per table, one PNG per figure
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn


@dataclass
class Subject:
    """A model and what it should look at.

    inputs    token ids (b l), or images (b c y x)
    labels    names of the tokens of the first row; classes: names of the model's answers
    text      a long sequence of real ids (n) to draw from, vocab_size  the ids the model knows; None for images
    train_text the same of the training data, for what differs between the two
    answers   (b) true classes or None
    masks     (b y x) true segmentation of the images: 1 foreground, 0 background, negative unlabelled; or None
    target    the answer to explain, None: the model's own first choice
    layers, channels, positions   which scans, channels and tokens to show; None: the probe's choice
    max_bytes memory that a probe may hold
    """

    model: nn.Module
    inputs: Tensor
    labels: Sequence[str] | None = None
    classes: Sequence[str] | None = None
    text: Tensor | None = None
    vocab_size: int | None = None
    train_text: Tensor | None = None
    answers: Tensor | None = None
    masks: Tensor | None = None
    target: int | None = None
    layers: Sequence[int] | None = None
    channels: Sequence[int] | None = None
    positions: Sequence[int] | None = None
    max_bytes: int = 1 << 30

    @property
    def is_image(self) -> bool:
        return self.inputs.is_floating_point() and self.inputs.ndim == 4

    def token(self, i: int) -> str:
        return repr(self.labels[i])[1:-1] if self.labels is not None and i < len(self.labels) else str(i)

    def answer(self, i: int) -> str:
        return repr(self.classes[i])[1:-1] if self.classes is not None and i < len(self.classes) else str(i)


@dataclass
class Finding:
    """summary: what to read first; tables: name -> (columns, rows); figures: name -> matplotlib figure."""

    summary: dict[str, str] = field(default_factory=dict)
    tables: dict[str, tuple[Sequence[str], Sequence[Sequence[Any]]]] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)

    def write(self, out: str | Path, title: str, command: str = "") -> list[Path]:
        """Write all of it into the folder `out`; returns the files, summary.md first."""
        out = Path(out)
        out.mkdir(parents=True, exist_ok=True)
        lines = [f"# {title}", ""] + ([f"`{command}`", ""] if command else [])
        lines += ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in self.summary.items()), ""]
        files = []
        for name, (columns, rows) in self.tables.items():
            files.append(out / f"{name}.csv")
            with files[-1].open("w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows([columns, *rows])
            lines.append(f"Table: [{name}.csv]({name}.csv), {len(rows)} rows of {', '.join(columns)}")
        for name, figure in self.figures.items():
            files.append(out / f"{name}.png")
            figure.savefig(files[-1], dpi=130)
            lines += ["", f"![{name}]({name}.png)"]
        summary = out / "summary.md"
        summary.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return [summary, *files]
