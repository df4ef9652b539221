"""The residual stream between the blocks of a language model, as transformers' `output_hidden_states` returns it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from ssmzoo.layers.decoder import Decoder


@contextmanager
def recorded(model: nn.Module, wanted: bool) -> Iterator[list[Tensor]]:
    """While it is open, a forward pass of `model` fills the list with n + 1 tensors (b l d) for n blocks.

    They are what the first block reads, what each but the last one leaves, and what the head reads, behind the last
    norm. Padded rows come back at the positions where they were given. `wanted` False records nothing. Raises
    ValueError for a model without a decoder.
    """
    hidden: list[Tensor] = []
    with ExitStack() as hooks:
        if wanted:
            blocks, norm = parts(model)
            padding: list[Any] = []

            def keep(x: Tensor) -> None:
                hidden.append(x if padding[0] is None else padding[0].restore(x))

            def first(block: nn.Module, args: tuple, kwargs: dict) -> None:
                padding.append(kwargs.get("mask"))
                keep(args[0])

            hooks.callback(blocks[0].register_forward_pre_hook(first, with_kwargs=True).remove)
            for block in blocks if norm is None else blocks[:-1]:
                hooks.callback(block.register_forward_hook(lambda _, args, output: keep(output[0])).remove)
            if norm is not None:
                hooks.callback(norm.register_forward_hook(lambda _, args, output: keep(output)).remove)
        yield hidden


def parts(model: nn.Module) -> tuple[list[nn.Module], nn.Module | None]:
    """The blocks of a language model and the norm behind them."""
    decoder = next((m for m in model.modules() if isinstance(m, Decoder)), None)
    if decoder is None:
        raise ValueError(f"{type(model).__name__} has no blocks in a row, so no hidden states between them")
    return list(getattr(decoder, decoder.blocks_name)), getattr(decoder, decoder.norm_name)


def depth(model: nn.Module) -> int | None:
    """The number of blocks; None for a model without a decoder."""
    return len(parts(model)[0]) if any(isinstance(m, Decoder) for m in model.modules()) else None
