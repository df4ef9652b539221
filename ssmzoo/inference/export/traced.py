"""What tracing programs need: scans as one loop of any length, models whose state goes in and out as tensors, and the
inputs and free axes of each kind of model."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ssmzoo.ops as ops
from ssmzoo.inference.export.source import Source
from ssmzoo.layers.state import map_state
from ssmzoo.ops.checks import compute_dtype


@contextlib.contextmanager
def plain_operators() -> Iterator[None]:
    """Within the block the zoo's operators are made of torch's own, and the selective scan is one loop over time."""
    with warnings.catch_warnings(), torch.no_grad(), ops.backend("reference"), ops.observe(selective_scan_fn=one_loop):
        warnings.simplefilter("ignore")  # of torch's exporter, about itself
        yield


def one_loop(call, *args, **kwargs):
    """`ssmzoo.ops.selective_scan_fn` by torch's higher-order scan, which becomes a loop of the program.

    With documents (seq_idx), complex A or one position the operator itself, `call`, is traced.
    """
    a = ops.selective_scan_fn.Arguments(*args, **kwargs)
    if a.seq_idx is not None or a.A.is_complex() or a.u.shape[2] == 1:
        return call(*args, **kwargs)
    from torch._higher_order_ops.scan import scan

    dtype = compute_dtype(a.u, a.delta, a.A, a.B, a.C)
    x, dt, A = a.u.to(dtype), a.delta.to(dtype), a.A.to(dtype)
    dt = dt if a.delta_bias is None else dt + a.delta_bias.to(dtype)[:, None]
    dt = F.softplus(dt) if a.delta_softplus else dt
    varying = {name: _steps(M.to(dtype), x.shape[1]) for name, M in (("B", a.B), ("C", a.C))}
    constant = {name: varying.pop(name) for name, M in (("B", a.B), ("C", a.C)) if M.ndim == 2}
    start = 0 * x[:, :, :1] if a.initial_state is None else a.initial_state.to(dtype)

    def step(h: Tensor, now: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        x_t, dt_t, *rest = now
        M = constant | dict(zip(varying, rest))
        h = torch.exp(dt_t[..., None] * A) * h + (dt_t * x_t)[..., None] * M["B"]  # (b e n)
        return h, (h * M["C"]).sum(-1)

    sequences = (x.permute(2, 0, 1), dt.permute(2, 0, 1), *varying.values())  # time first
    last, y = scan(step, start + torch.zeros_like(A), sequences, dim=0)
    y = y.permute(1, 2, 0)
    y = y if a.D is None else y + a.D.to(dtype)[:, None] * x
    y = (y if a.z is None else y * F.silu(a.z.to(dtype))).to(a.u.dtype)
    return (y, last) if a.return_last_state else y


def _steps(M: Tensor, channels: int) -> Tensor:
    """(e n) as it is; (b n l) or (b g n l) -> (l b e n)."""
    if M.ndim == 2:
        return M
    M = M.unsqueeze(1) if M.ndim == 3 else M
    return M.permute(3, 0, 1, 2).repeat_interleave(channels // M.shape[1], dim=2)


ROWS = 7  # of an example: a size that no axis of a model is compared with


class Call(NamedTuple):
    """How a model is called: its inputs with their names, which axes of them are free, and the names of the results."""

    model: nn.Module
    inputs: tuple[Tensor, ...]
    names: list[str]
    axes: list[dict[int, str]]
    results: list[str]


def call_of(source: Source) -> Call:
    """Pictures of any batch (and size, where the model takes any), or one token with the state in and out."""
    model = source.model.float()
    if source.kind == "language":
        state = first_state(model, ROWS)
        inputs = (torch.zeros(ROWS, 1, dtype=torch.long), *tensors_of(state))
        names = [f"state_{i}" for i in range(len(inputs) - 1)]
        axes = [{0: "batch"} for _ in inputs]
        results = ["logits", *(f"next_{name}" for name in names)]
        return Call(WithState(model, state), inputs, ["input_ids", *names], axes, results)
    return Call(model, (example(source),), ["pixels"], [{0: "batch"} | sides(source)], ["output"])


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


def form_of(source: Source) -> str:
    """The shape of the pictures that a program takes, in words: '(batch, 3, 32, 32)', '(batch, 3, height, width)'."""
    channels, *size = example(source).shape[1:]
    return f"(batch, {channels}, {', '.join(sides(source).values() or map(str, size))})"


def why_no_step(model: nn.Module) -> str | None:
    """Why one token cannot be a program of fixed shapes."""
    if not getattr(model, "causal", True):
        return "it does not read one token at a time"
    if first_state(model) is None:
        return "its state grows with the sequence or does not begin with zeros"
    return None


@torch.no_grad()
def compare(call: Call, program: Callable[..., Any], tolerance: float) -> None:
    """Results of program(*inputs) with the model's, on other data and another batch. Raises RuntimeError."""
    generator = torch.Generator().manual_seed(1)
    for batch in (len(call.inputs[0]), 3):
        fresh = [_like(x, batch, generator) for x in call.inputs]
        for got, right in zip(_tuple(program(*fresh)), _tuple(call.model(*fresh))):
            got, right = got.double(), right.double()
            error = (got - right).abs().max().item()
            if not error <= tolerance * (1 + right.abs().max().item()):
                raise RuntimeError(f"the program differs from the model by {error:.2e}: nothing was exported")


def _tuple(results: Any) -> tuple:
    return results if isinstance(results, tuple) else (results,)


def _like(x: Tensor, batch: int, generator: torch.Generator) -> Tensor:
    shape = (batch, *x.shape[1:])
    return torch.rand(shape, generator=generator) if x.is_floating_point() else torch.ones(shape, dtype=x.dtype)


class WithState(nn.Module):
    """A sequence model as a function of tensors: (ids (b l), *state) -> (logits (b l v), *state after them).

    template  a state of the model, for its form
    """

    def __init__(self, model: nn.Module, template: Any):
        super().__init__()
        self.model, self.template = model, template

    def forward(self, input_ids: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        rest = iter(state)
        out = self.model(input_ids, map_state(lambda _: next(rest), self.template))
        return out.logits, *tensors_of(out.state)


def tensors_of(state: Any) -> list[Tensor]:
    """The tensors of a state, in order."""
    found: list[Tensor] = []
    map_state(lambda tensor: found.append(tensor) or tensor, state)
    return found


@torch.no_grad()
def first_state(model: nn.Module, batch: int = 2) -> Any | None:
    """The state before the first token as tensors of zeros; None for a model whose state is not of one size, or does
    not begin with zeros."""
    ids = torch.arange(2).expand(batch, 2)
    one, two = model(ids[:, :1]), model(ids)
    if [t.shape for t in tensors_of(one.state)] != [t.shape for t in tensors_of(two.state)]:
        return None
    zeros = map_state(torch.zeros_like, one.state)
    same = torch.allclose(model(ids[:, :1], zeros).logits, one.logits, rtol=1e-4, atol=1e-6)
    return zeros if same else None
