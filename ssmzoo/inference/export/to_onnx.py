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


LANGUAGE = """One token per call: `input_ids` (batch, 1) and the tensors `state_i`, which are zeros before the first
token; results are `logits` (batch, 1, vocabulary) and `next_state_i` for the next call.

```python
import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession("model.onnx")
kinds = {"tensor(float)": np.float32, "tensor(int64)": np.int64, "tensor(bool)": np.bool_}
state = {}  # one sequence, nothing read yet
for slot in session.get_inputs()[1:]:
    state[slot.name] = np.zeros([1 if isinstance(side, str) else side for side in slot.shape], kinds[slot.type])
ids = [1, 2, 3]  # of the tokenizer; where it is bytes: list("a text".encode())
for token in ids:
    logits, *following = session.run(None, {"input_ids": np.array([[token]], np.int64), **state})
    state = dict(zip(state, following))
print(logits[0, -1].argmax())  # the likeliest next id
```"""

PICTURES = """`pixels` {form}, {levels}, to `output`.

```python
import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession("model.onnx")
pixels = np.zeros({shape}, np.float32)
output = session.run(None, {{"pixels": pixels}})[0]
print(output.shape)
```"""


def usage(source: Source) -> str:
    if source.kind == "language":
        return LANGUAGE
    shape = tuple(call_of(source).inputs[0].shape[1:])
    noted, levels = source.manifest.get("picture"), "normalised as in training"
    if source.kind == "restoration":
        levels = "levels from 0 to 1"
    elif isinstance(noted, dict) and "mean" in noted:
        levels = f"levels from 0 to 1 less {noted['mean']}, over {noted['std']}"
    return PICTURES.format(form=form_of(source), levels=levels, shape=(1, *shape))
