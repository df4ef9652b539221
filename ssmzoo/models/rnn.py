"""Elman RNN and LSTM as sequence models: the baselines that can emulate every finite automaton.

    tokens (one-hot) -> nn.RNN or nn.LSTM -> Linear without bias

Source: IBM/selective-dense-state-space-model @5bdc7f7 (Apache-2.0), models/rnn.py and lstm.py; parameter names are
theirs. Their `bidirectional` switch is left out: its projection has the wrong width and cannot run.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmzoo.layers.plain import is_plain
from ssmzoo.layers.state import ModelOutput, itemsize, refuse_prefix
from ssmzoo.ops.eager import why_not_eager
from ssmzoo.ops.library import Differentiable, Kernel
from ssmzoo.ops.transforms import transformed


class Elman(NamedTuple):
    """y_t = act(x_t + W y_{t-1}): x (l b n) with the biases, weight (n n), first (b n); cell: relu or tanh."""

    x: Tensor
    weight: Tensor
    first: Tensor
    cell: str


def elman(a: Elman) -> Tensor:
    """y (l b n), by torch's functions."""
    h, steps = a.first, []
    for x in a.x:
        h = getattr(torch, a.cell)(x + F.linear(h, a.weight))
        steps.append(h)
    return torch.stack(steps)


def elman_forward(a: Elman, save: bool) -> tuple[tuple[Tensor], None]:
    y, h, W, act = a.x.clone(), a.first, a.weight.T, getattr(torch, f"{a.cell}_")
    for step in y.unbind():
        h = act(step.addmm_(h, W))
    return (y,), None


def elman_backward(a: Elman, y: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """Two calls a step, the gradient of the weights in one product; autograd takes a dozen calls a step."""
    slope = torch.ops.aten.threshold_backward if a.cell == "relu" else torch.ops.aten.tanh_backward
    slope, zero = slope.grad_input, (0,) if a.cell == "relu" else ()
    dx, dys, g = torch.empty_like(y), dy.unbind(), dy[-1]
    for t, (step, h) in reversed(list(enumerate(zip(dx.unbind(), y.unbind())))):
        slope(g, h, *zero, grad_input=step)
        g = torch.addmm(dys[t - 1], step, a.weight) if t else step @ a.weight
    dweight = torch.addmm(dx[0].T @ a.first, dx[1:].flatten(0, 1).T, y[:-1].flatten(0, 1))
    return {"x": dx, "weight": dweight, "first": g}


ELMAN = Differentiable("elman", Elman, saved="y", twice=elman)
ELMAN.kernels["torch"] = Kernel(elman_forward, elman_backward)


class RNNState(NamedTuple):
    """h, and for an LSTM the cell c, both (b layers n)."""

    h: Tensor
    c: Tensor | None = None


class RNNModel(nn.Module):
    """Recurrent network with logits at every position.

    input_size    token ids, or the width of float inputs;  num_classes  classes, None: input_size
    state_size    n of every layer;  num_layers  layers
    cell          "lstm", "relu" or "tanh" (the last two are Elman networks)
    """

    def __init__(
        self,
        input_size: int = 3,
        num_classes: int | None = None,
        state_size: int = 64,
        num_layers: int = 1,
        cell: str = "lstm",
    ):
        super().__init__()
        if cell not in ("lstm", "relu", "tanh"):
            raise ValueError(f"cell = {cell!r}; choose 'lstm', 'relu' or 'tanh'")
        num_classes = input_size if num_classes is None else num_classes
        self.input_size, self.num_classes, self.state_size = input_size, num_classes, state_size
        if cell == "lstm":
            self.rnn: nn.RNNBase = nn.LSTM(input_size, state_size, num_layers, batch_first=True)
        else:
            self.rnn = nn.RNN(input_size, state_size, num_layers, nonlinearity=cell, batch_first=True)
        self.output_projection = nn.Linear(state_size, num_classes, bias=False)

    def forward(
        self,
        input_ids: Tensor,
        state: RNNState | None = None,
        *,
        mask: Tensor | None = None,
        seq_idx: Tensor | None = None,
        prefix: int | Tensor | None = None,
    ) -> ModelOutput:
        refuse_prefix(prefix, type(self).__name__)
        x = input_ids
        if not x.is_floating_point():
            units = torch.eye(self.input_size, dtype=next(self.parameters(), torch.empty(0)).dtype, device=x.device)
            x = F.embedding(x.long(), units)  # (b l v)
        if mask is None and seq_idx is None:
            y, state = self._run(x, state)
        else:
            y, state = self._step_by_step(x, state, mask, seq_idx)
        return ModelOutput(self.output_projection(y), state, {})

    def _run(self, x: Tensor, state: RNNState | None) -> tuple[Tensor, RNNState]:
        if self._trains_by_steps(x):
            return self._train(x, state)
        if state is None and transformed():  # vmap wants a first state with the axis of its samples
            state = RNNState(
                *(None if s is None else s + 0 * x[:, :1, :1] for s in self.allocate_state(len(x), x.device, x.dtype))
            )
        if state is None:
            hidden = None
        else:
            hidden = tuple(s.transpose(0, 1).contiguous() for s in state if s is not None)  # (layers b n)
            hidden = hidden if isinstance(self.rnn, nn.LSTM) else hidden[0]
        y, hidden = self.rnn(x, hidden)
        hidden = hidden if isinstance(hidden, tuple) else (hidden,)
        return y, RNNState(*(s.transpose(0, 1) for s in hidden))

    def _trains_by_steps(self, x: Tensor) -> bool:
        """Whether `elman_forward` and its gradient stand in for torch's cell, which autograd follows call by call."""
        plain = torch.is_grad_enabled() and x.is_cpu and len(x) and is_plain(self.rnn, among=frozenset({nn.RNN}))
        return plain and why_not_eager(x, *self.rnn.parameters()) is None

    def _train(self, x: Tensor, state: RNNState | None) -> tuple[Tensor, RNNState]:
        h = self.allocate_state(len(x), x.device).h if state is None else state.h
        y, last = x.transpose(0, 1), []  # (l b ...)
        for layer, (W_in, W, b_in, b) in enumerate(self.rnn.all_weights):
            inputs = F.linear(y, W_in, b_in + b)
            y = ELMAN(Elman(inputs, W, h[:, layer], self.rnn.nonlinearity), "torch")
            last.append(y[-1])
        return y.transpose(0, 1), RNNState(torch.stack(last, dim=1))

    def _step_by_step(self, x: Tensor, state: RNNState | None, mask: Tensor | None, seq_idx: Tensor | None):
        """torch's kernels know neither holes nor boundaries: one call per position, masked states kept."""
        state = self.allocate_state(x.shape[0], x.device, x.dtype) if state is None else state
        outputs = []
        for t in range(x.shape[1]):
            if seq_idx is not None and t > 0:
                same = (seq_idx[:, t] == seq_idx[:, t - 1])[:, None, None]
                state = RNNState(*(None if s is None else s * same for s in state))
            y, after = self._run(x[:, t : t + 1], state)
            if mask is not None:
                real = mask[:, t, None, None]
                after = RNNState(*(None if s is None else torch.where(real, s, old) for s, old in zip(after, state)))
            state = after
            outputs.append(y)
        return torch.cat(outputs, dim=1), state

    def state_bytes(self, length: int) -> int:
        return sum(s.numel() * itemsize(self)[0] for s in self.allocate_state(1) if s is not None)

    def allocate_state(self, batch_size: int, device=None, dtype=None) -> RNNState:
        """The state before the first token: zeros."""
        dtype = torch.float32 if dtype is None else dtype
        zeros = torch.zeros(batch_size, self.rnn.num_layers, self.state_size, device=device, dtype=dtype)
        return RNNState(zeros, zeros.clone() if isinstance(self.rnn, nn.LSTM) else None)
