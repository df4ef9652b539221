"""One token through all layers of a decoder in one operator, where every module is plain (`ssmzoo.layers.plain`).

Blocks and layers write themselves down as a program (`ssmzoo.layers.program`), which is kept as long as nothing of the
modules changes: submodules, weights and where they lie, hooks, attributes.
"""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable, Sequence
from operator import getitem, is_

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ssmzoo.layers.plain import is_plain
from ssmzoo.layers.program import Builder, NotPlain
from ssmzoo.ops import linear_act, stack_step, token_step
from ssmzoo.ops.dispatch import any_observed, wanted_backend
from ssmzoo.ops.eager import eager
from ssmzoo.ops.native import gather
from ssmzoo.ops.stack_step import Mamba2Layer, MambaLayer
from ssmzoo.ops.token_step.session import Session
from ssmzoo.ops.token_step.session import why_not as why_not_session

FEW = 8  # tokens for which a product is bound by reading the matrix
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
PARTS = ("_modules", "_parameters", "_buffers")
SIMPLE = (bool, int, float, str, type(None), types.FunctionType, types.BuiltinFunctionType)


class Watch:
    """What a program rests on: the modules below some roots as they were.

    Every token asks, with the caches full of weights, so that each place looked at is waited for: hooks are counted by
    the number of the last one made anywhere, and attributes of torch's own classes are all in weights and `training`.
    """

    def __init__(self, roots: Sequence[nn.Module], program: bool):
        modules = dict.fromkeys(m for root in roots for m in root.modules())
        everything = [m.__dict__ for m in modules]
        self.last_hook = RemovableHandle.next_id
        self.hooks = [d[name] for d in everything for name in HOOKS]
        self.hooked = list(map(len, self.hooks))
        self.program = program  # without one, a hook that goes may give it
        self.everything, self.sizes = (
            everything,
            list(map(len, everything)),
        )  # a forward of its own is one attribute more
        places = [(d[part], name) for d in everything for part in PARTS for name in d[part]]
        self.places, self.names = [place for place, _ in places], [name for _, name in places]
        self.held = [place[name] for place, name in places]
        self.tensors = [t for t in self.held if isinstance(t, Tensor)]
        self.pointers = list(map(Tensor.data_ptr, self.tensors))
        told = [(m.__dict__, k) for m in modules for k, v in m.__dict__.items() if _tells(m, k, v)]
        self.owners, self.attributes = [d for d, _ in told], [k for _, k in told]
        self.values = [d[k] for d, k in told]

    def same(self) -> bool:
        if not is_plain() or not self.same_hooks() or list(map(len, self.everything)) != self.sizes:
            return False
        try:
            if not all(map(is_, map(getitem, self.places, self.names), self.held)):
                return False
            if list(map(getitem, self.owners, self.attributes)) != self.values:
                return False
        except KeyError:
            return False
        return list(map(Tensor.data_ptr, self.tensors)) == self.pointers

    def same_hooks(self) -> bool:
        if self.program and RemovableHandle.next_id == self.last_hook:
            return True
        if list(map(len, self.hooks)) != self.hooked:
            return False
        self.last_hook = RemovableHandle.next_id
        return True


def _tells(module: nn.Module, name: str, value: object) -> bool:
    """Whether an attribute may change what a module computes."""
    if type(module).__module__.startswith("torch."):
        return name == "training" and isinstance(module, nn.Dropout)
    if name == "training" or name.startswith("_"):
        return name == "training"
    parts = value if isinstance(value, (list, tuple)) else value.values() if isinstance(value, dict) else (value,)
    return all(isinstance(part, SIMPLE) for part in parts)


class Kept:
    """The program of a decoder, or None where there is none, while its modules stay as they are.

    ends   (model, embedding, head): the program goes from ids to logits, for a `Session`
    """

    def __init__(
        self,
        decoder: nn.Module,
        blocks: Sequence[nn.Module],
        norm: nn.Module | None,
        width: int,
        ends: tuple[nn.Module, nn.Module, nn.Module] | None = None,
    ):
        self.program, builder = None, Builder(width)
        try:
            if ends is not None:
                for module in (ends[0], decoder):
                    builder.need(not module.training, is_plain(module, among={type(module)}))
                builder.embed(ends[1])
            for block in blocks:
                builder.use(block).program(builder, builder.x)
            if norm is not None:
                builder.norm(norm, builder.x)
                builder.code[-1] = builder.code[-1]._replace(out=builder.x)
            if ends is not None:
                builder.logits(ends[2])
            self.program = builder.program(_one_by_one(weakref.ref(decoder)))
        except NotPlain:
            pass
        gather([*decoder.parameters(), *decoder.buffers()])
        self.width = width
        roots = [*blocks, *builder.roots, *([] if norm is None else [norm])]
        self.watch = Watch(roots if ends is None else [ends[0]], self.program is not None)


_kept: weakref.WeakKeyDictionary[nn.Module, Kept] = weakref.WeakKeyDictionary()
_whole: weakref.WeakKeyDictionary[nn.Module, Kept] = weakref.WeakKeyDictionary()


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


def open_session(
    model: nn.Module, parts: tuple[nn.Module, nn.Module, nn.Module], blocks, norm: nn.Module | None, state: tuple
) -> tuple[Session, Watch] | None:
    """A session of the whole model, from ids to logits, over a copy of the state, and what it rests on; None where
    something is to be called. parts: decoder, embedding, head"""
    decoder, embedding, head = parts
    kept = _whole.get(model)
    if kept is None or not kept.watch.same():
        weight = embedding.weight
        if not weight.is_cpu:
            return None
        kept = _whole[model] = Kept(decoder, blocks, norm, embedding.embedding_dim, (model, embedding, head))
    if kept.program is None or why_not_session(kept.program, state) is not None:
        return None
    return Session(kept.program, state, head.out_features), kept.watch


def free_to_decode() -> bool:
    """Whether nothing asks for operators one by one: an observer, a backend by name, a mode of torch, autocast."""
    if torch.is_autocast_enabled("cpu") or not eager():
        return False
    return not any_observed() and wanted_backend() in (None, "c")


def apply_linear(linear: nn.Module, x: Tensor) -> Tensor:
    """linear(x), which for few tokens reads the matrix once and at the speed of memory. x (... d) -> (... e)"""
    free = not torch.compiler.is_compiling() and not torch.is_grad_enabled()  # compiled programs may be for every size
    if free and x.numel() <= FEW * x.shape[-1] and is_plain(linear):
        return linear_act(x, linear.weight, linear.bias)
    return linear(x)
