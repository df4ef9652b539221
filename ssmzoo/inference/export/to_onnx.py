"""One ONNX file: pictures of any batch (and size, where the model takes any), or one token with state in and out."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from torch import Tensor

from ssmzoo.inference.export.source import Source
from ssmzoo.inference.export.traced import Call, call_of, compare, form_of, plain_operators, why_no_step
from ssmzoo.layers.feedforward.router import Router

OPSET = 18
TOLERANCE = 1e-3  # of the largest output, between onnxruntime and torch


def refuse(source: Source) -> str | None:
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        return f"{', '.join(missing)} not installed (pip install {' '.join(missing)})"
    if source.kind == "language" and any(isinstance(module, Router) for module in source.model.modules()):
        return "ONNX has no stable sort, by which experts receive their tokens"
    if source.kind == "language":
        return why_no_step(source.model)
    return None if source.kind in ("image", "restoration") else "only pictures and language models are traced"


def write(source: Source, folder: Path) -> None:
    call, file = call_of(source), folder / "model.onnx"
    trace(call, file)
    check(call, file)


def trace(call: Call, file: Path) -> None:
    first, *rest = call.axes
    with plain_operators():
        program = torch.onnx.export(
            call.model,
            call.inputs,
            input_names=call.names,
            output_names=call.results,
            dynamic_shapes=(first, tuple(rest)) if rest else (first,),
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
            custom_translation_table={torch.ops.aten.sort.stable: stable_sort},
        )
    program.save(str(file))


def stable_sort(x, stable=None, dim: int = -1, descending: bool = False):
    """torch.sort in ONNX: TopK of all elements, which leaves equal ones in their order."""
    from onnxscript import opset18 as op

    length = op.Gather(op.Shape(x), op.Constant(value_ints=[dim]), axis=0)
    return op.TopK(x, length, axis=dim, largest=int(descending), sorted=1)


def check(call: Call, file: Path) -> None:
    """Compare onnxruntime's results with torch's. Raises RuntimeError."""
    from onnxruntime import InferenceSession

    session = InferenceSession(str(file), providers=["CPUExecutionProvider"])
    slots = [slot.name for slot in session.get_inputs()]

    def program(*inputs: Tensor) -> tuple[Tensor, ...]:
        fed = dict(zip(slots, (x.numpy() for x in inputs)))
        return tuple(map(torch.from_numpy, session.run(None, fed)))

    compare(call, program, TOLERANCE)


def usage(source: Source) -> str:
    if source.kind == "language":
        return (
            "One token per call: `input_ids` (batch, 1) and the tensors `state_i`, which are zeros before the first "
            "token; results are `logits` (batch, 1, vocabulary) and `next_state_i` for the next call.\n\n"
            '```python\nimport onnxruntime\nsession = onnxruntime.InferenceSession("model.onnx")\n```'
        )
    return (
        f"`pixels` {form_of(source)}, normalised as in training, to `output`.\n\n"
        '```python\nimport onnxruntime\nsession = onnxruntime.InferenceSession("model.onnx")\n'
        'output = session.run(None, {"pixels": pixels})\n```'
    )
