"""Where the patches of an image stand in a plain encoder's sequence, for the zoo's models and timm's."""

from __future__ import annotations

from torch import nn


def special_tokens(model: nn.Module, l: int) -> tuple[int, ...]:
    """Indices of the class and register tokens among the l of a sequence: what the zoo's encoders say, or timm's
    num_prefix_tokens in front."""
    if hasattr(model, "token_indices"):
        return tuple(model.token_indices(l))
    return tuple(range(getattr(model, "num_prefix_tokens", 0)))


def patch_grid(model: nn.Module, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of the patches that the model cuts an image into."""
    embed = model.patch_embed
    if callable(getattr(embed, "grid", None)):
        return tuple(embed.grid(height, width))
    return tuple(embed.dynamic_feat_size((height, width)))  # timm's
