"""Golden cases: tensors that official implementations computed, and how far we are from them.

A case is `<family>/<case>.safetensors` with `param/<official key>`, `input/<name>`, `output/<name>`,
`grad/<official key>`, `gradin/<input>`, `lossweight/<output>`, and a `.json` with the official class and arguments.
The scalar loss is the sum over the outputs with a `lossweight` of (output x lossweight).

Two functions of a family's file answer: `official` (see ssmzoo.released) when a module maps inputs to outputs, or
`golden(case) -> {output name: tensor}` when the case is something else (labels, metrics, training steps) or one module
does not cover it. `golden` uses `case.params`, `case.inputs` (leaves that require gradients) and
`case.meta`, and may fall back on `case.run_official()`.
"""

from __future__ import annotations

import inspect
import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from ssmzoo.released.family import find
from ssmzoo.released.load import build

ABS_FLOOR = 1e-6  # per element, times sqrt(numel): below it a difference is rounding, not an error


def relative_error(got: Tensor, expected: Tensor) -> float:
    """|got - expected| / |expected| in the 2-norm over the whole tensor, with a small absolute floor."""
    if got.shape != expected.shape:
        return float("inf")
    dtype = torch.complex128 if expected.is_complex() or got.is_complex() else torch.float64
    got, expected = got.detach().to(dtype), expected.detach().to(dtype)
    floor = ABS_FLOOR * max(1, expected.numel()) ** 0.5
    error = ((got - expected).abs().pow(2).sum().sqrt() / (expected.abs().pow(2).sum().sqrt() + floor)).item()
    return float("inf") if error != error else error


@dataclass
class GoldenCase:
    family: str
    name: str
    meta: dict
    params: dict[str, Tensor] = field(default_factory=dict)
    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    grads: dict[str, Tensor] = field(default_factory=dict)  # keyed "param/..." and "input/..."
    lossweights: dict[str, Tensor] = field(default_factory=dict)
    extra: dict[str, Tensor] = field(default_factory=dict)  # tensors under any other prefix

    @classmethod
    def load(cls, json_path: Path, dtype: torch.dtype | None = None) -> GoldenCase:
        """Read one case; floating tensors are converted to `dtype` when given."""
        meta = json.loads(Path(json_path).read_text())
        case = cls(Path(json_path).parent.name, Path(json_path).stem, meta)
        tensors = {}
        file = Path(json_path).with_suffix(".safetensors")
        if file.exists():
            from safetensors.torch import load_file

            tensors = load_file(file)
        parts = {"param": case.params, "input": case.inputs, "output": case.outputs, "lossweight": case.lossweights}
        for key, value in tensors.items():
            if dtype is not None and value.is_floating_point():
                value = value.to(dtype)
            kind, _, name = key.partition("/")
            if kind in ("grad", "gradin"):
                case.grads[f"{'param' if kind == 'grad' else 'input'}/{name}"] = value
            else:
                parts.get(kind, case.extra)[name if kind in parts else key] = value
        for kind, leaves in (("param", case.params), ("input", case.inputs)):
            for name, value in leaves.items():
                value.requires_grad_(f"{kind}/{name}" in case.grads)
        return case

    @property
    def official_kwargs(self) -> dict:
        return dict(self.meta.get("official_kwargs") or {})

    def build(self) -> tuple[nn.Module, dict[str, Tensor]]:
        """The official module and its tensors, differentiable in the official ones."""
        return build(self.family, self.params, self.official_kwargs)

    def run_official(self) -> dict[str, Tensor]:
        """Outputs by name, from the family's `official_` hook; differentiable in params and inputs."""
        module, state = self.build()
        module.train(not self.meta.get("eval_mode", True))
        order = [n if isinstance(n, str) else n["name"] for n in self.meta.get("inputs") or self.inputs]
        values = [self.inputs[n] for n in order if n in self.inputs]
        target = module.function if hasattr(module, "function") else module.forward
        names = inspect.signature(target).parameters
        by_name = all(n in names for n in order)
        args, kwargs = ((), dict(zip(order, values))) if by_name else (tuple(values), {})
        result = torch.func.functional_call(module, state, args, kwargs)
        result = result if isinstance(result, (tuple, list)) else (result,)
        return dict(zip(self.meta.get("outputs") or self.outputs, result))

    def check(self) -> tuple[float, float | None]:
        """(worst relative error of the outputs, of the gradients or None). Raises KeyError without a hook."""
        own = find(self.family, "golden")
        if own is None and find(self.family, "official") is None:
            raise KeyError(self.family)
        got = own(self) if own else self.run_official()
        missing = [name for name in self.outputs if name not in got]
        if missing:
            raise ValueError(f"outputs not produced: {', '.join(missing)}")
        error = max((relative_error(got[k], v) for k, v in self.outputs.items()), default=0.0)
        if not self.grads:
            return error, None
        loss = sum((got[k] * w).sum() for k, w in self.lossweights.items())
        loss.backward()
        grad_error = 0.0
        for key, expected in self.grads.items():
            kind, _, name = key.partition("/")
            leaf = (self.params if kind == "param" else self.inputs)[name]
            got_grad = leaf.grad if leaf.grad is not None else torch.zeros_like(leaf)
            grad_error = max(grad_error, relative_error(got_grad, expected))
        return error, grad_error
