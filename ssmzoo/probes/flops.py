"""Operations of one forward pass as the vision papers count: a multiplication with its addition is one.

    linear layers, convolutions, matrix products    multiply-adds, as torch's counter finds them
    selective scan                                   9 b l e n, + b l e each for skip D and gate z; 7 b l e n if the
                                                     states themselves are wanted (C constant)
    state-space duality                              its recurrence: 4 b l h p n, + b l h p for the skip
    causal convolution, state fusion                 b l c k; 27 b l d
    LayerNorm, RMSNorm, BatchNorm                    5, 5 and 2 per element

The model runs on the meta device: nothing is computed, and images of any size cost nothing.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections import Counter

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ssmzoo.ops import observe


def count_operations(model: nn.Module, *shape: int) -> Counter:
    """{"matrices", "scan", "convolution of a scan", "state fusion", "norm"} -> operations for an input of `shape`."""
    from torch.utils.flop_counter import FlopCounterMode

    found: Counter = Counter()
    seen = {
        "selective_scan_fn": selective_scan,
        "mamba_chunk_scan_combined": duality,
        "causal_conv1d_fn": convolution,
        "state_fusion": fusion,
    }
    observers = {name: functools.partial(function, found) for name, function in seen.items()}
    model, counter = copy.deepcopy(model).to("meta").eval(), FlopCounterMode(display=False)
    counter.mod_tracker = _WholeModel()
    with torch.no_grad(), observe(**observers), _Norms(found), counter:
        model(torch.empty(shape, device="meta"))
    found["matrices"] = counter.get_total_flops() // 2
    return found


def selective_scan(found, call, u, delta, A, B, C, D=None, z=None, *args, return_last_state: bool = False, **kwargs):
    states_only = C.ndim == 2 and D is None and z is None
    found["scan"] += u.numel() * ((7 if states_only else 9) * A.shape[1] + (D is not None) + (z is not None))
    y = torch.empty_like(u)
    return (y, u.new_empty(u.shape[0], *A.shape)) if return_last_state else y


def duality(found, call, x, dt, A, B, C, *args, D=None, return_final_states: bool = False, **kwargs):
    found["scan"] += x.numel() * (4 * B.shape[-1] + (D is not None))
    y = torch.empty_like(x)
    return (y, x.new_empty(x.shape[0], *x.shape[2:], B.shape[-1])) if return_final_states else y


def convolution(found, call, x, weight, *args, **kwargs):
    found["convolution of a scan"] += x.numel() * weight.shape[-1]
    return torch.empty_like(x)


def fusion(found, call, x, kernels, alpha):
    found["state fusion"] += 27 * x.numel()
    return torch.empty_like(x)


class _WholeModel(contextlib.nullcontext):
    """In the place of torch's module tracker, whose hooks on every module would keep models from fused operators."""

    parents = ("Global",)


class _Norms(TorchFunctionMode):
    """Counts the normalisations that a model, or an operator of ours, takes from torch."""

    PER_ELEMENT = {F.layer_norm: 5, F.rms_norm: 5, F.batch_norm: 2}

    def __init__(self, found: Counter):
        super().__init__()
        self.found = found

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in self.PER_ELEMENT:
            self.found["norm"] += self.PER_ELEMENT[function] * args[0].numel()
        return function(*args, **(kwargs or {}))


def giga(found: Counter) -> float:
    """The total in units of 10^9, as the papers' tables give it."""
    return sum(found.values()) / 1e9
