"""Names that people give to runs, folders, classes and files come into figures as they are, formulas or not."""

from typing import NamedTuple

import numpy as np
import pytest
import torch

NAMES = ["cost_$_{per^$unit", "$", "$$", "a$b", r"\frac{$}{$", "\x1b[2J$x_$", "_hidden", "Żółć 中"]


class Compared(NamedTuple):
    name: str
    degraded: torch.Tensor
    restored: torch.Tensor
    truth: torch.Tensor


def curves(png, name):
    from ssmzoo.train.report import draw_curves

    rows = png.with_suffix(".csv")
    rows.write_text("step,train/loss,val/loss\n1,2.0,\n2,1.0,1.5\n")
    return draw_curves(rows, png, "loss", name)


def comparison(png, name):
    from ssmzoo.cli.runs import draw

    draw({name: [{1: 2.0, 2: 1.0}, {1: 2.1, 2: 1.2}], f"{name}, seed": [{1: 2.0, 2: 1.0}]}, "val/loss", png)


def memory(png, name):
    from ssmzoo.tasks.metrics.recall import draw_memory

    draw_memory({name: [(100.0, 0.5)], "other": [(200.0, 0.7)]}, png)


def lengths(png, name):
    from ssmzoo.tasks.metrics.formal import LengthCurve, draw_lengths

    curve = LengthCurve(4)
    curve.count += 1
    draw_lengths(png, {name: curve}, 2, name)


def confusion(png, name):
    from ssmzoo.tasks.classification_figure import draw_confusion

    draw_confusion(torch.eye(2), [name, "other"], png)


def photographs(png, name):
    from ssmzoo.tasks.restoration_figure import draw_comparison

    image = torch.zeros(3, 4, 4, dtype=torch.uint8)
    draw_comparison([Compared(name, image, image, image)], png)


def sheet(png, name):
    from PIL import Image

    from ssmzoo.inference.predict import Prediction, draw_sheet

    file = png.with_name(f"{name.replace('/', '')}.png")
    Image.new("RGB", (4, 4)).save(file)
    draw_sheet([Prediction(str(file), [name], [1.0])], png)


def probe(png, name):
    from ssmzoo.probes import figures

    figure, axes = figures.canvas(1, 2)
    figures.words(axes[0, 0], [name, "b"], [0.5, -0.5], name)
    figures.lines(axes[0, 1], [1, 2], {name: [1.0, 2.0]}, "x", "y", name)
    figure.savefig(png)


def automaton(png, name):
    from ssmzoo.data.automata import Automaton
    from ssmzoo.probes.expressivity_figures import moves

    flip = Automaton(np.array([[1, 0], [0, 1]]), name=name, symbols=(name, f"{name}2"))
    moves(png, torch.eye(2).expand(2, 2, 2), torch.eye(2).expand(2, 2, 2), flip)


FIGURES = [curves, comparison, memory, lengths, confusion, photographs, sheet, probe, automaton]


@pytest.mark.parametrize("draw", FIGURES, ids=lambda f: f.__name__)
@pytest.mark.filterwarnings("ignore:Glyph", "ignore:The label")
def test_any_name_can_be_drawn(tmp_path, draw):
    for i, name in enumerate(NAMES):
        draw(tmp_path / f"{i}.png", name)
        assert (tmp_path / f"{i}.png").stat().st_size > 1000, name
