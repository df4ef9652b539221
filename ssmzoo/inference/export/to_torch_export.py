"""One torch.export program (.pt2) of torch's operators: pictures of any batch, or one token with state in and out."""

from __future__ import annotations

from pathlib import Path

import torch

from ssmzoo.inference.export.source import Source
from ssmzoo.inference.export.traced import call_of, compare, form_of, plain_operators, why_no_step

TOLERANCE = 1e-4  # of the largest result, between the program and the model
FILE = "model.pt2"


def refuse(source: Source) -> str | None:
    if source.kind == "language":
        return why_no_step(source.model)
    return None if source.kind in ("image", "restoration") else "only pictures and language models are traced"


def write(source: Source, folder: Path) -> None:
    call = call_of(source)
    free = {name: torch.export.Dim.DYNAMIC for axes in call.axes for name in axes.values()}
    free["batch"] = torch.export.Dim("batch", min=1)
    shapes = [{axis: free[name] for axis, name in axes.items()} for axes in call.axes]
    first, *rest = shapes
    with plain_operators():
        program = torch.export.export(
            call.model, call.inputs, dynamic_shapes=(first, tuple(rest)) if rest else (first,), strict=False
        )
    torch.export.save(program, folder / FILE)
    compare(call, torch.export.load(folder / FILE).module(), TOLERANCE)


def usage(source: Source) -> str:
    read = f'```python\nimport torch\nprogram = torch.export.load("{FILE}").module()\n'
    if source.kind == "language":
        state = call_of(source).inputs[1:]
        zeros = "".join(f"    torch.zeros({(1, *x.shape[1:])}, dtype={x.dtype}),\n" for x in state)
        return (
            "One token per call: ids (batch, 1) and the tensors of the state, which are zeros before the first token; "
            "results are logits (batch, 1, vocabulary) and the tensors of the next state. Needs nothing of ssmzoo.\n\n"
            f"{read}state = (\n{zeros})\nlogits, *state = program(torch.zeros(1, 1, dtype=torch.long), *state)\n```"
        )
    return (
        f"Pictures {form_of(source)}, normalised as in training, to the model's output. Needs nothing of "
        f"ssmzoo.\n\n{read}output = program(pixels)\n```"
    )
