"""LoRA (Hu et al. 2021): a frozen matrix W plus a trained one of low rank,

    W' = W + (alpha / r) B A        A (r in) normal / sqrt(in), B (out r) zero at the start

as a parametrisation of `weight`, so that kernels which read the matrix themselves see W' too. A checkpoint holds
W, A and B; whoever reads it for use gets W' under the plain name (`merged`).
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ssmzoo.layers.roles import in_head
from ssmzoo.suggest import nearest

ORIGINAL, ADDED = ".parametrizations.weight.original", ".parametrizations.weight.0."  # what follows a layer's name


class LowRank(nn.Module):
    """weight (out in) -> weight + scale B A"""

    def __init__(self, weight: Tensor, rank: int, alpha: float):
        super().__init__()
        out, into = weight.shape
        self.lora_A = nn.Parameter(torch.randn(rank, into, dtype=weight.dtype, device=weight.device) / into**0.5)
        self.lora_B = nn.Parameter(torch.zeros(out, rank, dtype=weight.dtype, device=weight.device))
        self.register_buffer("scale", torch.tensor(alpha / rank))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.scale.to(weight.dtype) * (self.lora_B @ self.lora_A)


def add_lora(
    model: nn.Module, rank: int = 8, alpha: float | None = None, targets: Sequence[str] | str = "*"
) -> list[str]:
    """Put LoRA on the linear layers of a model and freeze everything else but a classifier's head; in place.

    rank     r;  alpha  None: 2 r
    targets  globs of module names, such as "*.in_proj"; heads, embeddings and layers whose weight is a function of
             other tensors (parametrised by the model itself) are never among them

    Returns the names of the layers. Raises ValueError when no layer fits or the rank is out of range.
    """
    alpha = 2 * rank if alpha is None else alpha
    if not isinstance(rank, int) or rank < 1 or alpha <= 0:
        raise ValueError(f"lora.rank is {rank} and lora.alpha {alpha}; both must be positive, rank a whole number")
    patterns = [targets] if isinstance(targets, str) else list(targets)
    known = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and not in_head(n)]
    known = [n for n in known if not parametrize.is_parametrized(model.get_submodule(n), "weight")]
    for pattern in patterns:
        if not fnmatch.filter(known, pattern):
            raise ValueError(f"lora.targets: no linear layer is called {pattern!r}{nearest(pattern, known)}")
    chosen = [name for name in known if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]
    if not chosen:
        raise ValueError(f"{type(model).__name__} has no linear layer that LoRA could be put on")
    language = any(isinstance(m, nn.Embedding) for m in model.modules())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not language and in_head(name.rpartition(".")[0]))
    for name in chosen:
        layer = model.get_submodule(name)
        parametrize.register_parametrization(layer, "weight", LowRank(layer.weight, rank, alpha))
    return chosen


def merged(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a checkpoint with LoRA under the plain names of its model; others as they are."""
    found = dict(state)
    for layer in [key.removesuffix(f"{ADDED}lora_A") for key in state if key.endswith(f"{ADDED}lora_A")]:
        A, B, scale = (found.pop(f"{layer}{ADDED}{name}") for name in ("lora_A", "lora_B", "scale"))
        weight = found.pop(layer + ORIGINAL)
        found[f"{layer}.weight"] = weight + scale.to(weight.dtype) * (B @ A)
    return found


def merge(model: nn.Module) -> nn.Module:
    """The model with its LoRA added to the matrices for good, in place."""
    for module in model.modules():
        if parametrize.is_parametrized(module, "weight") and any(
            isinstance(p, LowRank) for p in module.parametrizations.weight
        ):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
    return model
