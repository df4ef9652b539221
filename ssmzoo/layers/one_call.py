"""One token through all layers of a decoder in one operator, where every module is plain (`ssmzoo.layers.plain`).

Blocks and layers write themselves down as a program (`ssmzoo.layers.program`), which is kept as long as nothing of the
modules changes: submodules, weights and where they lie, hooks, attributes.
"""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ssmzoo.layers.plain import is_plain
from ssmzoo.layers.program import Builder, NotPlain
from ssmzoo.ops import linear_act, stack_step, token_step
from ssmzoo.ops.eager import eager
from ssmzoo.ops.stack_step import Mamba2Layer, MambaLayer

FEW = 8  # tokens for which a product is bound by reading the matrix
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
PARTS = ("_modules", "_parameters", "_buffers")
SIMPLE = (bool, int, float, str, type(None), types.FunctionType, types.BuiltinFunctionType)


class Watch:
    """What a program rests on: the modules below some roots as they were."""

    def __init__(self, roots: Sequence[nn.Module]):
        modules = dict.fromkeys(m for root in roots for m in root.modules())
        self.modules, self.types = list(modules), [type(m) for m in modules]
        self.own = [m.__dict__ for m in modules]
        self.hooks = [d[name] for d in self.own for name in HOOKS]
        self.tried = [len(h) for h in self.hooks]
        self.places = [(d[part], name) for d in self.own for part in PARTS for name in d[part]]
        self.held = [place[name] for place, name in self.places]
        self.tensors = [t for t in self.held if isinstance(t, Tensor)]
        self.pointers = [t.data_ptr() for t in self.tensors]
        self.names = [(d, k) for m, d in zip(modules, self.own) for k, v in d.items() if _tells(m, k, v)]
        self.values = [d[k] for d, k in self.names]

    def same(self) -> bool:
        try:
            if not is_plain() or [len(h) for h in self.hooks] != self.tried:
                return False
            if [type(m) for m in self.modules] != self.types or [d[k] for d, k in self.names] != self.values:
                return False
            if not all([place[name] is held for (place, name), held in zip(self.places, self.held)]):
                return False
            return [t.data_ptr() for t in self.tensors] == self.pointers and not any(["forward" in d for d in self.own])
        except KeyError:
            return False


def _tells(module: nn.Module, name: str, value: object) -> bool:
    """Whether an attribute may change what a module computes. torch's own classes say all in weights and `training`."""
    torchs = type(module).__module__.startswith("torch.")
    if name == "training" or torchs or name.startswith("_"):
        return name == "training"
    parts = value if isinstance(value, (list, tuple)) else value.values() if isinstance(value, dict) else (value,)
    return all(isinstance(part, SIMPLE) for part in parts)


class Kept:
    """The program of a decoder, or None where there is none, while its modules stay as they are."""

    def __init__(self, decoder: nn.Module, blocks: Sequence[nn.Module], norm: nn.Module | None, width: int):
        self.program, builder = None, Builder(width)
        try:
            for block in blocks:
                builder.use(block).program(builder, builder.x)
            if norm is not None:
                builder.norm(norm, builder.x)
                builder.code[-1] = builder.code[-1]._replace(out=builder.x)
            self.program = builder.program(_one_by_one(weakref.ref(decoder)))
        except NotPlain:
            pass
        self.width = width
        self.watch = Watch([*blocks, *builder.roots, *([] if norm is None else [norm])])


_kept: weakref.WeakKeyDictionary[nn.Module, Kept] = weakref.WeakKeyDictionary()


def _one_by_one(decoder: weakref.ref) -> Callable:
    """The layers as modules: the operator's definition, without keeping the decoder alive."""
    return lambda x, states: decoder().one_by_one(x, states)


def layers_of(blocks: Sequence[nn.Module]) -> list[MambaLayer | Mamba2Layer] | None:
    """What `stack_step` needs of blocks, one mixer behind a norm each; None unless all of them may be passed over."""
    layers = []
    for block in blocks:
        layer = block.layer() if hasattr(block, "layer") else None
        if layer is None:
            return None
        layers.append(layer)
    return layers


def step(decoder: nn.Module, blocks, norm: nn.Module | None, x: Tensor, state: tuple) -> tuple | None:
    """x (b 1 d) and the layers' states -> the same behind all blocks and the norm, and aux; None: the blocks must be
    called one by one."""
    if not (x.is_cpu and x.dtype is torch.float32 or x.is_cuda) or not eager(x):
        return None
    if torch.is_autocast_enabled("cuda" if x.is_cuda else "cpu"):
        return None
    if x.is_cuda:
        layers = layers_of(blocks)
        if layers is None:
            return None
        y, new = stack_step(x[:, 0], layers, state)
        y = y[:, None] if norm is None else norm(y[:, None])
        return y, tuple(type(before)(*after) for before, after in zip(state, new)), {}
    kept = _kept.get(decoder)
    if kept is None or kept.width != x.shape[2] or not kept.watch.same():
        kept = _kept[decoder] = Kept(decoder, blocks, norm, x.shape[2])
    if kept.program is None:
        return None
    y, new, aux = token_step(x[:, 0], kept.program, state)
    return y[:, None], new, aux


def apply_linear(linear: nn.Module, x: Tensor) -> Tensor:
    """linear(x), which for few tokens reads the matrix once and at the speed of memory. x (... d) -> (... e)"""
    free = not torch.compiler.is_compiling() and not torch.is_grad_enabled()  # compiled programs may be for every size
    if free and x.numel() <= FEW * x.shape[-1] and is_plain(linear):
        return linear_act(x, linear.weight, linear.bias)
    return linear(x)
