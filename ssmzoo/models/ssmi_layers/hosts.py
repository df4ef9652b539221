"""The places of a frozen model where a memory goes: behind the attention's residual, in front of the feed-forward.

    pre-norm (blocks of this zoo, LLaMA, GPT-NeoX without parallel residual)
        a = h + A(n1(h));   m = a + Memory(a);   h' = m + F(n2(m))
    parallel residual (GPT-NeoX)
        a = h + A(n1(h));   u = Memory(a);       h' = a + u + F(n2(h + u))
    post-norm (BERT)
        a = LN(h + A(h));   m = a + Memory(a);   h' = LN(m + F(m))

A block of this zoo gets one more sublayer, whose state travels with the block's. A layer of Hugging Face's gets hooks,
between which a `Site` holds what they need; its state is handed in and taken out by who calls the model.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from ssmzoo.layers.decoder import Block
from ssmzoo.models.ssmi_layers.memory import Memory, MemoryState

NORMS = {"input_layernorm", "post_attention_layernorm"}
HAS_MEMORY = "has_memory"
DROPOUTS = {"post_attention_dropout", "post_mlp_dropout"}


class OnFrozen(nn.Module):
    """Something trained around `self.backbone`, which stays as it is and in evaluation."""

    backbone: nn.Module

    def train(self, mode: bool = True) -> OnFrozen:
        super().train(mode)
        self.backbone.eval()
        return self


def check_visual(visual: Tensor | None, state: Any, input_ids: Tensor) -> None:
    """Raise ValueError for pictures behind the first call, or not one for every row of the text."""
    if visual is None:
        return
    if state is not None:
        raise ValueError("visual belongs into the first call: the state has read it already")
    if len(visual) != len(input_ids):
        raise ValueError(f"visual has {len(visual)} rows, input_ids {len(input_ids)}; expected one picture per row")


class Site(nn.Module):
    """A memory in a layer that is not of this zoo: `state` and `mask` (b t) are set before a pass, `after` is read."""

    def __init__(self, memory: Memory):
        super().__init__()
        self.memory = memory
        self.hand_in(None, None)

    def hand_in(self, state: MemoryState | None, mask: Tensor | None) -> None:
        self.state, self.mask, self.after = state, mask, None
        self.residual = self.added = None

    def note_residual(self, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.residual = args[0] if args else kwargs["hidden_states"]

    def remember(self, a: Tensor) -> Tensor:
        y, self.after = self.memory(a, self.state, mask=self.mask)
        return y

    def behind_attention(self, attention: nn.Module, args: tuple, output: tuple | Tensor) -> tuple | Tensor:
        """Attention's output A -> A + Memory(h + A)."""
        y, rest = (output[0], output[1:]) if isinstance(output, tuple) else (output, None)
        self.added = self.remember(self.residual + y)
        y, self.residual = y + self.added, None
        return y if rest is None else (y, *rest)

    def before_parallel_norm(self, norm: nn.Module, args: tuple) -> tuple:
        added, self.added = self.added, None
        return (args[0] + added, *args[1:])

    def behind_post_norm(self, attention: nn.Module, args: tuple, output: tuple | Tensor) -> tuple | Tensor:
        """BERT's a, whose norm is within -> a + Memory(a)."""
        if isinstance(output, tuple):
            return (output[0] + self.remember(output[0]), *output[1:])
        return output + self.remember(output)


class Host(NamedTuple):
    """A shape of layers: how it is called, which it is, how a memory is put in, whether it reads in one direction."""

    name: str
    knows: Callable[[nn.Module], bool]
    put: Callable[[nn.Module, Memory], Site | None]
    causal: bool


def parts_of(layer: nn.Module) -> set[str]:
    return {name for name, _ in layer.named_children()}


def is_block(layer: nn.Module) -> bool:
    if not isinstance(layer, Block) or type(layer).forward is not Block.forward:
        return False
    if getattr(layer, "parallel", False) or layer.residual is not None:
        return False
    first, *_ = layer.sublayers()
    return first[1] is not None and first[0] in layer.mixers


@functools.cache
def with_memory(kind: type[Block]) -> type[Block]:
    """A class of blocks with one more sublayer behind its first."""

    def sublayers(self):
        first, *rest = kind.sublayers(self)
        return [first, ("memory", _no_norm, self.memory), *rest]

    return type(kind.__name__, (kind,), {"sublayers": sublayers, "__module__": kind.__module__})


def _no_norm(x: Tensor) -> Tensor:
    return x


def put_in_block(block: Block, memory: Memory) -> None:
    block.__dict__["memory"] = memory  # registered by the adapter: the block's own names and weights stay what they are
    block.__class__ = with_memory(type(block))
    block.set_kinds({name: layer for name, _, layer in block.sublayers()})


def is_llama(layer: nn.Module) -> bool:
    scaled = hasattr(layer, "residual_multiplier") or hasattr(layer, "use_parallel_residual")
    return parts_of(layer) == NORMS | {"self_attn", "mlp"} and not scaled


def is_gpt_neox(layer: nn.Module) -> bool:
    return parts_of(layer) == NORMS | DROPOUTS | {"attention", "mlp"} and hasattr(layer, "use_parallel_residual")


def is_bert(layer: nn.Module) -> bool:
    if parts_of(layer) != {"attention", "intermediate", "output"}:
        return False
    return parts_of(layer.attention) == {"self", "output"} and "LayerNorm" in parts_of(layer.attention.output)


def put_behind(name: str, layer: nn.Module, memory: Memory) -> Site:
    site = Site(memory)
    layer.register_forward_pre_hook(site.note_residual, with_kwargs=True)
    getattr(layer, name).register_forward_hook(site.behind_attention)
    if getattr(layer, "use_parallel_residual", False):
        layer.post_attention_layernorm.register_forward_pre_hook(site.before_parallel_norm)
    return site


def put_behind_norm(layer: nn.Module, memory: Memory) -> Site:
    site = Site(memory)
    layer.attention.register_forward_hook(site.behind_post_norm)
    return site


HOSTS = (
    Host("blocks of this zoo whose sublayers stand in series", is_block, put_in_block, True),
    Host(
        "LLaMA (input_layernorm, self_attn, post_attention_layernorm, mlp)",
        is_llama,
        functools.partial(put_behind, "self_attn"),
        True,
    ),
    Host(
        "GPT-NeoX (input_layernorm, attention, post_attention_layernorm, mlp)",
        is_gpt_neox,
        functools.partial(put_behind, "attention"),
        True,
    ),
    Host(
        "BERT (attention with its LayerNorm, intermediate, output)",
        is_bert,
        put_behind_norm,
        False,
    ),
)


def put(host: Host, layer: nn.Module, memory: Memory) -> Site | None:
    layer.__dict__[HAS_MEMORY] = True
    return host.put(layer, memory)


def width(layer: nn.Module) -> int:
    """d, of the norm in front of the attention or behind it."""
    if isinstance(layer, Block):
        return layer.sublayers()[0][1].weight.numel()
    norm = layer.attention.output.LayerNorm if is_bert(layer) else layer.input_layernorm
    return norm.weight.numel()


def find_layers(model: nn.Module) -> tuple[Host, list[nn.Module]]:
    """The layers of a model, in order, and their shape. Raises ValueError when none of HOSTS knows them."""
    lists = [(name, list(m)) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    for _, layers in lists:
        for host in HOSTS:
            if all(host.knows(layer) for layer in layers):
                if any(HAS_MEMORY in layer.__dict__ for layer in layers):
                    raise ValueError(f"{type(model).__name__} has memories in its layers already")
                return host, layers
    seen = [
        f"{name} of {type(layers[0]).__name__} ({', '.join(sorted(parts_of(layers[0])))})" for name, layers in lists
    ]
    raise ValueError(
        f"SSMI does not know the layers of {type(model).__name__}: it has {'; '.join(seen[:3]) or 'no list of layers'}"
        f"; known are {'; '.join(host.name for host in HOSTS)}"
    )


def chosen_layers(which: str | Sequence[int], count: int) -> list[int]:
    """Numbers of the layers: "all", "every_k" (the k-th, the 2k-th, ...), "last_k", or a list."""
    if isinstance(which, str):
        kind, _, number = which.partition("_")
        k = int(number) if number.isdecimal() else 0
        if which == "all":
            return list(range(count))
        if kind == "every" and 1 <= k <= count:
            return list(range(k - 1, count, k))
        if kind == "last" and 1 <= k <= count:
            return list(range(count - k, count))
    elif len(set(which)) == len(which) > 0 and all(isinstance(i, int) and 0 <= i < count for i in which):
        return sorted(which)
    raise ValueError(
        f"layers is {which!r}; expected all, every_k or last_k with k in 1..{count}, or different numbers in "
        f"0..{count - 1}"
    )
