"""The skeleton of every language model: embedding, blocks of residual sublayers, norm, head.

    x = embed(ids);   x <- x + f(norm(x)) for every sublayer of every block;   logits = W_head norm(x)

A sublayer is a slot. Its kind is read off the parameters of its `forward`, once, when the block is built:

    mixer          forward(x, state=None, *, mask, seq_idx) -> (y, state), or (y, state, aux); one that also takes
                   `prefix` may read that many leading positions in both directions
    experts        forward(x, mask) -> (y, aux)
    feed-forward   forward(x) -> y

Padding, packing, recomputation and the states are handled here and nowhere else. A model whose checkpoints use other
names for the parts overrides `Block.sublayers` and the two names on top of `Decoder`.

b batch, l length, d width, v vocabulary.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from ssmzoo.layers.feedforward.moe import merge_aux
from ssmzoo.layers.feedforward.router import Router
from ssmzoo.layers.norm import RMSNorm
from ssmzoo.layers.one_call import Session, Watch, apply_linear, open_session, step
from ssmzoo.layers.plain import is_plain
from ssmzoo.layers.program import Builder, in_one_call
from ssmzoo.layers.state import ModelOutput, Padding, is_step, left_align
from ssmzoo.ops.stack_step import Mamba2Layer, MambaLayer
from ssmzoo.ops.token_step import Register

NORMS = frozenset({RMSNorm})  # of layers that may be passed over in one operator on a GPU
ROUTING = [torch.ops.aten.topk.default]  # kept: a rounding difference could send a token to another expert
PRODUCTS = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]
EXPERTS = torch.ops.ssmzoo.grouped_matmul.default
RECOMPUTE = (False, True, "full", "selective")  # grad_checkpointing


class Block(nn.Module):
    """Pre-norm residual sublayers by name, in series, or in parallel behind one shared norm.

    layers     the sublayers in order | norm: class of the norms, called with d_model
    residual   None for x + y, or a method (name, x, u, y) -> the stream after sublayer `name` made y of u = norm(x)
    forward    x (b l d) -> x (b l d); the mixer's state, {name: state} when there are several mixers; aux of sublayers
    """

    residual: Callable[[str, Tensor, Tensor, Tensor], Tensor] | None = None

    def __init__(
        self,
        d_model: int,
        layers: Mapping[str, nn.Module],
        parallel: bool = False,
        norm: Callable[[int], nn.Module] = nn.LayerNorm,
    ):
        super().__init__()
        self.parallel = parallel
        self.norms = nn.ModuleDict({name: norm(d_model) for name in (["shared"] if parallel else layers)})
        self.layers = nn.ModuleDict(layers)
        self.set_kinds(layers)

    def set_kinds(self, layers: Mapping[str, nn.Module]) -> None:
        """Remember what each sublayer takes: a wrapper that replaces one later is called like the original."""
        self.takes = {name: frozenset(inspect.signature(m.forward).parameters) for name, m in layers.items()}
        self.mixers = [name for name, takes in self.takes.items() if "state" in takes]
        self.packs_prefixes = {name: getattr(layers[name], "packed_prefix", False) for name in self.mixers}

    def sublayers(self) -> list[tuple[str, nn.Module | None, nn.Module]]:
        """(name, norm, layer) in order; the norm is None where the last norm's output is used again."""
        if self.parallel:
            norms = [self.norms["shared"]] + [None] * (len(self.layers) - 1)
        else:
            norms = self.norms.values()
        return list(zip(self.layers, norms, self.layers.values()))

    def forward(
        self,
        x: Tensor,
        state: Any = None,
        *,
        mask: Padding | None = None,
        seq_idx: Tensor | None = None,
        prefix: Tensor | None = None,
    ) -> tuple[Tensor, Any, list[dict[str, Tensor]]]:
        u, states, aux = None, {}, []
        single, more = len(self.mixers) == 1, {} if prefix is None else {"prefix": prefix}
        for name, norm, layer in self.sublayers():
            u = u if norm is None else norm(x)
            takes = self.takes[name]
            if "state" in takes:
                before = state if single or state is None else state[name]
                y, states[name], *extra = layer(u, before, mask=mask, seq_idx=seq_idx, **more)
                aux += extra[0] if extra else ()
            elif "mask" in takes:
                y, extra = layer(u, None if mask is None else mask.mask)
                aux.append(extra)
            else:
                y = layer(u)
            x = x + y if self.residual is None else self.residual(name, x, u, y)
        return x, states[self.mixers[0]] if single else states, aux

    def layer(self) -> MambaLayer | Mamba2Layer | None:
        """What `stack_step` needs instead of this block's forward; None unless it is one plain mixer behind a norm."""
        if (
            type(self).forward is not Block.forward
            or self.residual is not None
            or not is_plain(self, among={type(self)})
        ):
            return None
        (_, norm, mixer), *more = self.sublayers()
        plain = is_plain(norm, among=NORMS) and in_one_call(norm.weight)
        return mixer.layer(norm) if plain and not more and hasattr(mixer, "layer") else None

    def program(self, p: Builder, x: Register) -> None:
        """This block as instructions that change x."""
        u = None
        for name, norm, layer in self.sublayers():
            mark = p.free
            u = u if norm is None else p.norm(norm, x)
            self.add(p, name, x, u, p.use(layer).program(p, u))
            p.free = p.free if self.parallel else mark

    def add(self, p: Builder, name: str, x: Register, u: Register, y: Register) -> None:
        """`residual` as instructions."""
        p.need(self.residual is None)
        p.add(x, y)


class Decoder(nn.Module):
    """embedding -> blocks -> norm: ids (b l), or vectors (b l d), -> hidden (b l d), state, aux.

    blocks             made after the embedding, in order | norm: None for none
    residual_in_fp32   keep the residual stream in fp32 when the model computes in lower precision
    """

    blocks_name, norm_name = "blocks", "norm"  # attributes under which they are registered

    def __init__(
        self,
        embedding: nn.Module,
        blocks: Iterable[Block],
        norm: nn.Module | None = None,
        residual_in_fp32: bool = False,
    ):
        super().__init__()
        self.embedding = embedding
        self.add_module(self.blocks_name, nn.ModuleList(blocks))
        self.add_module(self.norm_name, norm)
        self.residual_in_fp32, self.grad_checkpointing = residual_in_fp32, False

    def forward(
        self,
        input_ids: Tensor,
        state: tuple | None = None,
        *,
        mask: Tensor | None = None,
        seq_idx: Tensor | None = None,
        prefix: int | Tensor | None = None,
        keep: int = 0,
    ) -> tuple[Tensor, tuple, dict[str, Tensor]]:
        """mask (b l) True = real token; seq_idx (b l) numbers packed documents; prefix: see `leading_positions`;
        keep: return only the last so many positions (0: all)."""
        if input_ids.shape[1] == 0:
            raise ValueError("input_ids is empty: a sequence model needs at least one token per call")
        if keep < 0:
            raise ValueError(f"logits_to_keep must be 0 (all positions) or the number of last positions, got {keep}")
        blocks, norm = getattr(self, self.blocks_name), getattr(self, self.norm_name)
        padding = None
        if mask is not None:
            if mask.shape != input_ids.shape[:2]:
                raise ValueError(f"mask has shape {tuple(mask.shape)}, input_ids want {tuple(input_ids.shape[:2])}")
            padding = left_align(mask)
            input_ids, seq_idx = padding.align(input_ids), padding.align_seq_idx(seq_idx)
        if prefix is not None:
            prefix = leading_positions(prefix, input_ids, state, padding, seq_idx, blocks)
        x = input_ids if input_ids.is_floating_point() else self.embedding(input_ids)  # (b l d)
        if self.residual_in_fp32 and x.dtype in (torch.float16, torch.bfloat16):
            x = x.float()
        how = torch.is_grad_enabled() and self.grad_checkpointing
        states, aux = [], []
        one = state is not None and is_step(x, state, padding, seq_idx) and prefix is None
        if one and (stepped := step(self, blocks, norm, x, state)) is not None:
            x, states, aux = stepped
            return x, states, aux
        for block, before in zip(blocks, state or (None,) * len(blocks), strict=True):
            run = functools.partial(recomputed, block, how) if how else block
            x, after, extra = run(x, before, mask=padding, seq_idx=seq_idx, prefix=prefix)
            states.append(after)
            aux += extra
        if norm is not None:
            x = norm(x)
        x = x if padding is None else padding.restore(x)
        return x[:, -keep:], tuple(states), merge_aux(aux) if aux else {}

    def one_by_one(self, x: Tensor, state: tuple) -> tuple[Tensor, tuple, dict[str, Tensor]]:
        """x (b d) of one token behind all blocks and the norm, the blocks called as modules."""
        blocks, norm = getattr(self, self.blocks_name), getattr(self, self.norm_name)
        x, states, aux = x[:, None], [], []
        for block, before in zip(blocks, state, strict=True):
            x, after, extra = block(x, before, mask=None, seq_idx=None, prefix=None)
            states.append(after)
            aux += extra
        x = x if norm is None else norm(x)
        return x[:, 0], tuple(states), merge_aux(aux) if aux else {}

    def set_grad_checkpointing(self, enable: bool | str = True) -> None:
        """What the backward pass recomputes instead of keeping: nothing (False), every block (True or "full"), or all
        but its projections ("selective"): norms, convolutions, scans, attention and activations, which cost little
        beside what they hold. The choice of experts is always kept."""
        if enable not in RECOMPUTE:
            raise ValueError(f"grad_checkpointing is {enable!r}; expected True, False, 'full' or 'selective'")
        self.grad_checkpointing = enable


class LanguageModel(nn.Module):
    """What every language model is called with: a decoder, called like `Decoder`, and a head over the vocabulary."""

    decoder_name, head_name = "decode", "head"  # attributes

    def forward(
        self,
        input_ids: Tensor,
        state: tuple | None = None,
        *,
        mask: Tensor | None = None,
        seq_idx: Tensor | None = None,
        prefix: int | Tensor | None = None,
        logits_to_keep: int = 0,
    ) -> ModelOutput:
        """As `Decoder`; logits_to_keep: only those of the last so many positions (0: all), to save memory."""
        decode, head = getattr(self, self.decoder_name), getattr(self, self.head_name)
        hidden, state, aux = decode(input_ids, state, mask=mask, seq_idx=seq_idx, prefix=prefix, keep=logits_to_keep)
        return ModelOutput(apply_linear(head, hidden) if hidden.shape[1] == 1 else head(hidden), state, aux)

    def token_parts(self) -> tuple[nn.Module, nn.Module, nn.Module] | None:
        """(decoder, embedding, head) if one token more, after a state, is embedding, decoder and head and nothing
        else; a class whose `forward` or `decode` is its own says so anew (`Decoding` in ssmzoo.inference.decoding)."""
        decoder = self if self.decoder_name == "decode" else getattr(self, self.decoder_name)
        return decoder, decoder.embedding, getattr(self, self.head_name)

    def open_session(self, state: tuple) -> tuple[Session, Watch] | None:
        """`ssmzoo.layers.one_call.open_session`, if the class's `token_parts` are those of its `forward`."""
        homes = [_home(type(self), name) for name in ("token_parts", "forward", "decode")]
        parts = self.token_parts() if homes[0] <= min(homes[1:]) else None
        if parts is None or type(parts[0]).forward is not Decoder.forward and parts[0] is not self:
            return None
        blocks, norm = getattr(parts[0], parts[0].blocks_name), getattr(parts[0], parts[0].norm_name)
        return open_session(self, parts, blocks, norm, state)


def _home(cls: type, name: str) -> int:
    """Where in the order of its bases a class has a method from; behind all of them: nowhere."""
    return next((i for i, base in enumerate(cls.__mro__) if name in base.__dict__), len(cls.__mro__))


class CausalLM(LanguageModel, Decoder):
    """A decoder and a head over the vocabulary."""

    decode, token_parts = Decoder.forward, LanguageModel.token_parts

    def __init__(self, embedding: nn.Module, blocks: Iterable[Block], head: nn.Module, **decoder):
        super().__init__(embedding, blocks, **decoder)
        self.head = head


class BackboneLM(LanguageModel):
    """The same under the names of released checkpoints: a subclass registers a decoder `backbone` and a `lm_head`."""

    decoder_name, head_name = "backbone", "lm_head"

    def set_grad_checkpointing(self, enable: bool | str = True) -> None:
        self.backbone.set_grad_checkpointing(enable)


def recomputed(block: Block, how: bool | str, *args: Any, **kwargs: Any):
    """The block, whose activations are computed again in the backward pass; how: `Decoder.set_grad_checkpointing`."""
    routes, kept = any(isinstance(m, Router) for m in block.modules()), {}
    if how == "selective" or routes:
        policy = keep_products if how == "selective" else ROUTING
        kept["context_fn"] = functools.partial(create_selective_checkpoint_contexts, policy)
    return checkpoint(block, *args, use_reentrant=False, **kept, **kwargs)


def keep_products(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Keep the products with weights, but not those of low rank (a time step from a few numbers), which are cheap.

    A product of one row is a sum over tokens (router losses), which torch reshapes in place.
    """
    if op in ROUTING or op is EXPERTS:
        return CheckpointPolicy.MUST_SAVE
    if op in PRODUCTS:
        (rows, inner), columns = args[-2].shape, args[-1].shape[1]
        if rows > 1 and columns <= 8 * inner:
            return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def leading_positions(
    prefix: int | Tensor,
    input_ids: Tensor,
    state: Any,
    padding: Padding | None,
    seq_idx: Tensor | None,
    blocks: Iterable[Block],
) -> Tensor | None:
    """How many leading real tokens of every row may be read in both directions, (b) int64; None for none at all.

    prefix   one number for all rows, one per row, or, for packed documents, a bool tensor (b l) that is True at the
             leading positions of every document that are read so; it comes back as it is, real tokens in front

    Raises ValueError unless the prefix lies whole in the first call, at the beginning of a document (without a bool
    tensor: of the only one of its row), and every mixer reads prefixes.
    """
    b, length = input_ids.shape[:2]
    prefix = torch.as_tensor(prefix, device=input_ids.device)
    if prefix.dtype == torch.bool and prefix.ndim:
        return packed_prefixes(prefix, input_ids, state, padding, seq_idx, blocks)
    if prefix.ndim > 1 or prefix.is_floating_point() or prefix.dtype == torch.bool or prefix.numel() not in (1, b):
        raise ValueError(f"prefix must be an integer or {b} of them, got {prefix.dtype} {tuple(prefix.shape)}")
    most = torch.full((b,), length, device=prefix.device) if padding is None else padding.lengths
    if not prefix.is_cpu:
        prefix = torch.minimum(prefix.clamp(min=0), most)  # what a GPU holds is not waited for
    elif not torch.compiler.is_compiling():
        if bool((prefix < 0).any() | (prefix > most).any()):
            raise ValueError(
                f"prefix = {prefix.tolist()} must lie in 0..{most.tolist()}, the lengths of the rows: it is read "
                "whole, in the first call"
            )
        if not prefix.any():
            return None
    if state is not None or seq_idx is not None:
        which = "state" if state is not None else "seq_idx (of packed documents, say the positions: a bool tensor)"
        raise ValueError(f"prefix belongs to the beginning of one sequence per row and does not go with {which}")
    check_mixers(blocks, packed=False)
    return prefix.expand(b).long()


def packed_prefixes(
    prefix: Tensor,
    input_ids: Tensor,
    state: Any,
    padding: Padding | None,
    seq_idx: Tensor | None,
    blocks: Iterable[Block],
) -> Tensor | None:
    """The bool form of `leading_positions`; seq_idx has its real tokens in front already."""
    if prefix.shape != input_ids.shape[:2]:
        raise ValueError(f"prefix has shape {tuple(prefix.shape)}, input_ids want {tuple(input_ids.shape[:2])}")
    if padding is not None:
        prefix = padding.align(prefix) & padding.mask
    if prefix.is_cpu and not torch.compiler.is_compiling():  # a GPU would have to be waited for
        begins = prefix[:, 1:] & ~prefix[:, :-1]  # where a prefix begins inside of a row
        if seq_idx is not None:
            begins = begins & (seq_idx[:, 1:] == seq_idx[:, :-1])
        if begins.any():
            row, at = (int(i) for i in begins.nonzero()[0])
            raise ValueError(f"prefix begins at position {at + 1} of row {row}, which does not begin a document")
        if not prefix.any():
            return None
    if state is not None:
        raise ValueError("prefix belongs to the beginning of a sequence and does not go with state")
    check_mixers(blocks, packed=True)
    return prefix


def check_mixers(blocks: Iterable[Block], packed: bool) -> None:
    """Raise ValueError unless all mixers read prefixes (of packed documents)."""
    for i, block in enumerate(blocks):
        for name in block.mixers:
            if "prefix" in block.takes[name] and (block.packs_prefixes[name] or not packed):
                continue
            layer = type(dict((n, m) for n, _, m in block.sublayers())[name]).__name__
            reads = "in one direction only" if "prefix" not in block.takes[name] else "one prefix per row only"
            raise ValueError(
                f"prefix: {layer} (block {i}, {name}) reads {reads}; leave prefix out, or use a "
                "model all of whose mixers read prefixes"
            )


def reads_prefixes(model: nn.Module) -> bool:
    """Whether a model may be given the prefixes of packed documents. A model whose settings leave no layer that makes
    use of them has an attribute `reads_prefixes = False`."""
    blocks = [m for m in model.modules() if isinstance(m, Block)]
    able = all("prefix" in b.takes[name] and b.packs_prefixes[name] for b in blocks for name in b.mixers)
    return bool(blocks) and able and getattr(model, "reads_prefixes", True)


def layer_pattern(pattern: str, n_layer: int, kinds: Mapping[str, Any]) -> list:
    """Which layer stands where: "MMMMMMA" with kinds {"M": ..., "A": ...} -> the kinds in order, n_layer of them.

    A shorter pattern repeats when it divides n_layer. Raises ValueError for unknown letters and other lengths.
    """
    known = ", ".join(kinds)
    unknown = sorted(set(pattern) - set(kinds))
    if unknown:
        raise ValueError(f"layer_pattern {pattern!r} has unknown letters {', '.join(unknown)}; known are {known}")
    if not pattern or n_layer % len(pattern):
        raise ValueError(
            f"layer_pattern {pattern!r} has {len(pattern)} letters; expected {n_layer}, one per layer, or a divisor"
        )
    return [kinds[letter] for letter in pattern * (n_layer // len(pattern))]


def check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"{name} must be a positive integer, got {size!r}")


def padded_vocab_size(vocab_size: int, multiple: int) -> int:
    """`vocab_size` rounded up to a multiple; the extra rows are never targets."""
    if vocab_size < 1 or multiple < 1:
        raise ValueError(
            f"need a positive vocabulary and multiple, got vocab_size={vocab_size}, pad_vocab_size_multiple={multiple}"
        )
    return -(-vocab_size // multiple) * multiple
