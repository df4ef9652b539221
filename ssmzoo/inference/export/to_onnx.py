"""One ONNX file: pictures of any batch (and size, where the model takes any), or one token with state in and out."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from torch import Tensor, nn

from ssmzoo.inference.export.source import Source
from ssmzoo.inference.export.traced import WithState, first_state, plain_operators, tensors_of
from ssmzoo.layers.feedforward.router import Router

OPSET = 18
TOLERANCE = 1e-3  # of the largest output, between onnxruntime and torch


def refuse(source: Source) -> str | None:
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        return f"{', '.join(missing)} not installed (pip install 'ssmzoo[export]')"
    if source.kind == "language":
        return why_no_step(source.model)
    return None if source.kind in ("image", "restoration") else "only pictures and language models are traced"


def why_no_step(model: nn.Module) -> str | None:
    """Why one token cannot be a program of fixed shapes."""
    if not getattr(model, "causal", True):
        return "it does not read one token at a time"
    if any(isinstance(module, Router) for module in model.modules()):
        return "ONNX has no stable sort, by which experts receive their tokens"
    if first_state(model) is None:
        return "its state grows with the sequence or does not begin with zeros"
    return None


def write(source: Source, folder: Path) -> None:
    model, file = source.model.float(), folder / "model.onnx"
    if source.kind == "language":
        state = first_state(model)
        inputs = (torch.zeros(2, 1, dtype=torch.long), *tensors_of(state))
        names = [f"state_{i}" for i in range(len(inputs) - 1)]
        axes = ({0: "batch"}, tuple({0: "batch"} for _ in names))
        trace(
            WithState(model, state),
            inputs,
            axes,
            file,
            ["input_ids", *names],
            ["logits", *(f"next_{n}" for n in names)],
        )
    else:
        x = example(source)
        trace(model, (x,), ({0: "batch"} | sides(source),), file, ["pixels"], ["output"])
        inputs = (x,)
    check(model if source.kind != "language" else WithState(model, state), inputs, file)


def example(source: Source) -> Tensor:
    """Two pictures of the size that the model was trained with."""
    node = source.node or {}
    channels = node.get("in_chans", node.get("inp_channels", getattr(source.model, "in_chans", 3)))
    side = node.get("img_size") or source.manifest.get("data", {}).get("image_size")
    side = side or (224 if source.kind == "image" else 64)
    height, width = (side, side) if isinstance(side, int) else side
    return torch.rand(2, channels, height, width, generator=torch.Generator().manual_seed(0))


def sides(source: Source) -> dict[int, str]:
    """The axes of height and width where the traced model takes any."""
    free = source.kind == "restoration" and source.model.window_size == 1 and source.model.size_multiple == 1
    return {2: "height", 3: "width"} if free else {}


def trace(model: nn.Module, inputs: tuple, axes: tuple, file: Path, names: list[str], results: list[str]) -> None:
    with plain_operators():
        program = torch.onnx.export(
            model,
            inputs,
            input_names=names,
            output_names=results,
            dynamic_shapes=axes,
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


@torch.no_grad()
def check(model: nn.Module, inputs: tuple[Tensor, ...], file: Path) -> None:
    """Compare onnxruntime's results with torch's on other data and another batch. Raises RuntimeError."""
    from onnxruntime import InferenceSession

    session = InferenceSession(str(file), providers=["CPUExecutionProvider"])
    generator = torch.Generator().manual_seed(1)
    for batch in (len(inputs[0]), 3):
        fresh = [_like(x, batch, generator) for x in inputs]
        expected = model(*fresh)
        expected = expected if isinstance(expected, tuple) else (expected,)
        fed = {slot.name: x.numpy() for slot, x in zip(session.get_inputs(), fresh)}
        for got, right in zip(session.run(None, fed), expected):
            error = (torch.from_numpy(got) - right).abs().max().item()
            if not error <= TOLERANCE * (1 + right.abs().max().item()):
                raise RuntimeError(f"onnxruntime's results differ from torch's by {error:.2e}: nothing was exported")


def _like(x: Tensor, batch: int, generator: torch.Generator) -> Tensor:
    shape = (batch, *x.shape[1:])
    return torch.rand(shape, generator=generator) if x.is_floating_point() else torch.ones(shape, dtype=x.dtype)


def usage(source: Source) -> str:
    if source.kind == "language":
        return (
            "One token per call: `input_ids` (batch, 1) and the tensors `state_i`, which are zeros before the first "
            "token; results are `logits` (batch, 1, vocabulary) and `next_state_i` for the next call.\n\n"
            '```python\nimport onnxruntime\nsession = onnxruntime.InferenceSession("model.onnx")\n```'
        )
    form = "(batch, channels, height, width)"
    return (
        f"`pixels` {form}, normalised as in training, to `output`.\n\n"
        '```python\nimport onnxruntime\nsession = onnxruntime.InferenceSession("model.onnx")\n'
        'output = session.run(None, {"pixels": pixels})\n```'
    )
