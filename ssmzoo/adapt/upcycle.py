"""Upcycling: the experts of a mixture start as copies of a dense feed-forward, some of their hidden units drawn anew.

    W1_e, Wg_e, W2_e = W1, Wg, W2       then, for a drawn share r of the hidden units (other ones for every expert):
    their columns of W1_e and Wg_e and rows of W2_e ~ N(mu, sigma^2), mu and sigma of the values that they replace

r = 0 copies (naive upcycling), r = 1 keeps nothing but the moments; the paper's best is 0.5. With `renormalise` the
weights of the chosen experts add up to 1, so that at r = 0 the mixture computes what the dense model did. The released
script draws other units for each of the three matrices (`separate=True`); the paper reads as the same ones.
Source: Drop-Upcycling (arXiv 2502.19261).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Generator, Tensor, nn

from ssmzoo.layers.feedforward.mlp import GATED, FeedForward, GatedMLP
from ssmzoo.layers.feedforward.moe import Experts, MoE, build_moe
from ssmzoo.models.cheems_layers.cross_domain import SwiGLU

BANK = "expert_inner_function."
LAYOUTS = (("lin1_weight", "lin2_weight", "gate_weight"), ("fc1.weight", "fc2.weight"))


def upcycle(
    model: nn.Module,
    n_experts: int,
    fraction: float = 0.5,
    *,
    top_k: int = 2,
    renormalise: bool = True,
    separate: bool = False,
    generator: Generator | None = None,
    **router,
) -> nn.Module:
    """A copy of a dense model in which every feed-forward without biases is a mixture of n_experts.

    fraction   r, the share of hidden units that are drawn anew | router: further arguments of `build_moe`
    Raises ValueError when the model has no such feed-forward.
    """
    check_fraction(fraction)
    dense = {name: m for name, m in model.named_modules() if type(m) in (FeedForward, GatedMLP, SwiGLU)}
    dense = {name: m for name, m in dense.items() if not any(key.endswith("bias") for key in m.state_dict())}
    if not dense:
        raise ValueError(f"{type(model).__name__} has no dense feed-forward without biases that could become experts")
    result, state = copy.deepcopy(model), model.state_dict()
    for name, layer in dense.items():
        parts = dense_parts(state, f"{name}.")
        d, width = parts["lin1_weight"].shape[1:]
        options = dict(top_k=top_k, renormalise=renormalise) | router
        moe = build_moe(d, n_experts, width, expert=kind_of(layer), **options).to(parts["lin1_weight"])
        moe.load_state_dict(drawn(parts, n_experts, fraction, separate, generator, BANK), strict=False)
        result.set_submodule(name, moe.train(layer.training))
    for block in result.modules():  # a mixture is called otherwise than the dense layer was
        if hasattr(block, "set_kinds"):
            block.set_kinds({name: layer for name, _, layer in block.sublayers()})
    return result


def upcycled_state(
    model: nn.Module,
    found: Mapping[str, Tensor],
    fraction: float = 0.5,
    separate: bool = False,
    generator: Generator | None = None,
) -> dict[str, Tensor]:
    """`found`, tensors of a dense model (or of a mixture of one expert) in our names, with those of the experts of
    `model` made of its feed-forwards where it has none of their shape."""
    check_fraction(fraction)
    result = dict(found)
    for name, moe in model.named_modules():
        if not isinstance(moe, MoE) or not isinstance(bank := moe.expert_inner_function, Experts):
            continue
        have = found.get(f"{name}.{BANK}lin1_weight")
        if have is not None and len(have) != 1:
            continue
        parts = dense_parts(found, f"{name}." if have is None else f"{name}.{BANK}")
        if parts and all(getattr(bank, key, None) is not None for key in parts):
            for key in [key for key in result if key.startswith(f"{name}.") and not key.startswith(f"{name}.ln")]:
                del result[key]
            result |= drawn(parts, bank.n_experts, fraction, separate, generator, f"{name}.{BANK}")
    return result


def dense_parts(state: Mapping[str, Tensor], at: str) -> dict[str, Tensor]:
    """The matrices of one feed-forward as those of a bank of one expert; {} when there is none at this place."""
    if f"{at}lin1_weight" in state:
        return {key: state[at + key] for key in LAYOUTS[0] if at + key in state}
    if f"{at}up_proj.weight" in state:
        names = {"lin1_weight": "up_proj", "gate_weight": "gate_proj", "lin2_weight": "down_proj"}
        return {key: state[f"{at}{theirs}.weight"].T[None] for key, theirs in names.items()}
    if not all(at + key in state for key in LAYOUTS[1]):
        return {}
    first, second = (state[at + key] for key in LAYOUTS[1])
    if len(first) == 2 * second.shape[1]:  # [value, gate] of a gated MLP
        value, gate = first.chunk(2)
        return {"lin1_weight": value.T[None], "gate_weight": gate.T[None], "lin2_weight": second.T[None]}
    return {"lin1_weight": first.T[None], "lin2_weight": second.T[None]}


def drawn(
    parts: Mapping[str, Tensor], n: int, fraction: float, separate: bool, generator: Generator | None, at: str
) -> dict[str, Tensor]:
    """n copies of every matrix, with a share of the hidden units of each copy drawn anew."""
    width = parts["lin1_weight"].shape[-1]
    count, result = round(fraction * width), {}
    units = [torch.randperm(width, generator=generator)[:count] for _ in range(n)]
    for key, matrix in parts.items():
        copies = matrix.detach().repeat(n, 1, 1)  # (e d f), lin2 (e f d)
        for expert, chosen in zip(copies, units):
            if separate:
                chosen = torch.randperm(width, generator=generator)[:count]
            hidden = expert if key == "lin2_weight" else expert.T  # (f d), a view
            old = hidden[chosen]
            if old.numel() > 1:
                noise = torch.randn(old.shape, generator=generator).to(old)
                hidden[chosen] = old.mean() + old.std() * noise
        result[at + key] = copies
    return result


def kind_of(layer: nn.Module) -> str:
    """The name under which `Experts` knows a dense layer's activation."""
    if isinstance(layer, SwiGLU):
        return "swiglu"
    name = {nn.functional.relu: "relu", nn.functional.gelu: "gelu", nn.functional.silu: "silu"}[layer.activation]
    return {plain: gated for gated, plain in GATED.items()}[name] if isinstance(layer, GatedMLP) else name


def check_fraction(fraction: float) -> None:
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction = {fraction} of the hidden units is drawn anew: it must lie in [0, 1]")
