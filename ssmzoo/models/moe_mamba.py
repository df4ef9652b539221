"""MoE-Mamba: Mamba layers (all of the context, always) alternating with Switch experts (one per token, by choice).

    interleaved   x += Mamba(LN(x));  x += MoE(LN(x))            the paper's model
    parallel      x += Mamba(LN(x)) + MoE(LN(x))                 one shared LN
    inner         x += Mamba(LN(x)), with experts in place of the conv, gate and/or output projection inside Mamba
    none          x += Mamba(LN(x))                              the plain-Mamba baseline of the paper

Every sublayer has its own LayerNorm before it; there is no norm before the head, and the head is not tied: adding
either breaks checkpoint parity. Mamba keeps its own initialisation, the rest is truncated normal with scale 0.1.
The paper's 8 "blocks" are 8 pairs, so its plain Mamba of the same size has 16.
Differs from the released code: positions that padding occupies are not routed, capacity is at least one token, and
in eval mode nothing is dropped unless eval_capacity_factor says so.

b batch, l length, d d_model, v vocab_size.
Source: arXiv 2401.04081; llm-random (Apache-2.0): lizrd/core/llm.py, research/conditional/moe_layers, research/mamba.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ssmzoo.deprecated import old_arguments, then
from ssmzoo.layers.decoder import Block, CausalLM, check_sizes
from ssmzoo.layers.feedforward.moe import MoE, active_parameters, build_moe, router_arguments
from ssmzoo.layers.init import truncated_normal_
from ssmzoo.layers.mixers.mamba import Mamba
from ssmzoo.layers.state import Padding
from ssmzoo.models.token_dynamics import choose_scenario
from ssmzoo.suggest import check_slot, nearest

ARRANGEMENTS = ("interleaved", "parallel", "inner", "none")
PROJECTIONS = ("conv", "gate", "output")


class InnerProjections(nn.Module):
    """The two halves of Mamba's input projection as separate modules: conv_proj gives x, gate_proj gives z."""

    def __init__(self, conv_proj: nn.Module, gate_proj: nn.Module):
        super().__init__()
        self.conv_proj, self.gate_proj = conv_proj, gate_proj


class InnerMoEMamba(Mamba):
    """Mamba some of whose projections (a subset of conv, gate, output) are MoE layers; also returns their aux."""

    def __init__(self, d_model: int, experts_in: tuple[str, ...], moe, **mamba):
        e = int(mamba.get("expand", 2) * d_model)
        make = {name: (moe if name in experts_in else functools.partial(nn.Linear, bias=False)) for name in PROJECTIONS}
        in_proj = InnerProjections(make["conv"](d_model, e), make["gate"](d_model, e))
        super().__init__(d_model, in_proj=in_proj, out_proj=make["output"](e, d_model), **mamba)

    def forward(self, x: Tensor, state=None, *, mask: Padding | None = None, seq_idx: Tensor | None = None):
        aux: list[dict[str, Tensor]] = []
        u, z = (_project(p, x, mask, aux) for p in (self.in_proj.conv_proj, self.in_proj.gate_proj))
        y, state = self.mix(u, z, state, mask, seq_idx)
        return _project(self.out_proj, y, mask, aux), state, aux


def _project(projection: nn.Module, x: Tensor, padding: Padding | None, aux: list) -> Tensor:
    if not isinstance(projection, MoE):
        return projection(x)
    y, losses = projection(x, None if padding is None else padding.mask)
    aux.append(losses)
    return y


class DecoderLM(CausalLM):
    """A decoder without final norm and tying, initialised as llm-random's.

    Embedding and head are truncated normal with scale `init_scale` and fan-in 1 and d.
    """

    def __init__(self, vocab_size: int, d_model: int, blocks: list[Block], init_scale: float = 0.1):
        super().__init__(nn.Embedding(vocab_size, d_model), blocks, nn.Linear(d_model, vocab_size, bias=False))
        truncated_normal_(self.embedding.weight, 1, init_scale)
        truncated_normal_(self.head.weight, d_model, init_scale)

    def num_parameters(self, embeddings: bool = True) -> tuple[int, int]:
        """(total, active per token); without embedding and head when `embeddings` is False, as papers count."""
        outside = 0 if embeddings else self.embedding.weight.numel() + self.head.weight.numel()
        return sum(p.numel() for p in self.parameters()) - outside, active_parameters(self) - outside


@old_arguments(scenario=then(choose_scenario))
class MoEMambaLM(DecoderLM):
    """MoE-Mamba in all the arrangements of its paper; the defaults are its 25M row (542M parameters, 26M active).

    n_blocks         pairs of Mamba and MoE; Mamba layers when the arrangement is inner or none
    n_experts, d_expert  experts per MoE layer and their width (3 d_model by default), or a list of unequal ones
    arrangement      interleaved | parallel | inner | none, as above
    inner_moe        the projections that hold experts when the arrangement is inner: some of conv, gate, output
    moe_every        only every n-th block has experts (the n-th, the 2n-th ...); the others are plain Mamba
    expert           relu | gelu | silu | reglu | geglu | swiglu
    router           token_choice, with top_k, capacity_factor (training), balance_weight, z_loss_weight; noisy_top_k,
                     top_p and competition, likewise (ssmzoo.layers.feedforward.moe.build_moe); or
                     expert_choice, every expert taking top_k / n_experts of the tokens at each time step over the
                     batch: for training and scoring in batches, not for decoding
    router_options   further arguments of the router, by name, such as {top_p: 0.5} or {penalty_weight: 0.1}
    d_state, expand  of Mamba (ssmzoo.layers.mixers.mamba.Mamba)

    Raises ValueError for sizes below 1, top_k > n_experts and unknown names.
    """

    def __init__(
        self,
        vocab_size: int = 50257,
        d_model: int = 512,
        n_blocks: int = 8,
        n_experts: int = 42,
        d_expert: int | Sequence[int] | None = None,
        arrangement: str = "interleaved",
        inner_moe: str | Sequence[str] = PROJECTIONS,
        moe_every: int = 1,
        expert: str = "relu",
        router: str = "token_choice",
        top_k: int = 1,
        capacity_factor: float | None = 1.0,
        eval_capacity_factor: float | None = None,
        balance_weight: float = 0.01,
        z_loss_weight: float = 0.0,
        d_state: int = 16,
        expand: float = 2,
        router_options: Mapping[str, Any] | None = None,
    ):
        check_sizes(
            vocab_size=vocab_size,
            d_model=d_model,
            n_blocks=n_blocks,
            n_experts=n_experts,
            d_expert=d_expert if isinstance(d_expert, int) else 1,
            moe_every=moe_every,
            top_k=top_k,
        )
        if arrangement not in ARRANGEMENTS:
            raise ValueError(
                f"unknown arrangement {arrangement!r}{nearest(str(arrangement), ARRANGEMENTS)}; "
                f"choose one of {', '.join(ARRANGEMENTS)}"
            )
        inner_moe = (inner_moe,) if isinstance(inner_moe, str) else tuple(inner_moe)
        if not inner_moe or set(inner_moe) - set(PROJECTIONS):
            raise ValueError(f"inner_moe must name some of {', '.join(PROJECTIONS)}; got {list(inner_moe)}")
        moe = moe_factory(
            n_experts,
            3 * d_model if d_expert is None else d_expert,
            expert,
            router,
            top_k,
            capacity_factor,
            eval_capacity_factor,
            balance_weight,
            z_loss_weight,
            router_options,
        )
        mamba = dict(d_state=d_state, expand=expand)

        def block(i: int) -> Block:
            experts_here = arrangement != "none" and (i + 1) % moe_every == 0
            if arrangement == "inner" and experts_here:
                return Block(d_model, {"mamba": InnerMoEMamba(d_model, inner_moe, moe, **mamba)})
            layers = {"mamba": Mamba(d_model, **mamba)}
            if experts_here:
                layers["feedforward"] = moe(d_model, d_model)
            return Block(d_model, layers, parallel=arrangement == "parallel")

        super().__init__(vocab_size, d_model, [block(i) for i in range(n_blocks)])
        self.causal = router != "expert_choice" or arrangement == "none"

    def decode(self, input_ids: Tensor, state: tuple | None, **more) -> tuple[Tensor, tuple, dict[str, Tensor]]:
        if state is not None and not self.causal:
            raise ValueError(
                "expert choice compares the tokens of a batch, so it cannot continue from a state; "
                "use router=token_choice for a model that generates"
            )
        return super().decode(input_ids, state, **more)

    token_parts = DecoderLM.token_parts  # expert choice has no program


def moe_factory(
    n_experts: int,
    d_expert: int | Sequence[int],
    expert: str,
    router: str,
    top_k: int,
    capacity_factor: float | None,
    eval_capacity_factor: float | None,
    balance_weight: float,
    z_loss_weight: float,
    router_options: Mapping[str, Any] | None = None,
):
    """(d_input, d_output) -> a MoE layer with these settings."""
    if top_k > n_experts:
        raise ValueError(f"top_k = {top_k} experts per token, but there are only n_experts = {n_experts}")
    check_slot("router_options", router_options, router_arguments(router), f"router {router}")
    options = dict(z_loss_weight=z_loss_weight)
    if router == "expert_choice":
        options |= dict(fraction=top_k / n_experts, softmax_over="experts", group_by_batch=True, norm=True)
    elif router == "top_p":
        options |= dict(balance_weight=balance_weight)
    else:
        factors = dict(capacity_factor=capacity_factor, eval_capacity_factor=eval_capacity_factor)
        options |= dict(top_k=top_k, balance_weight=balance_weight, **factors)
    options |= dict(router_options or {})
    d_expert = d_expert if isinstance(d_expert, int) else [int(w) for w in d_expert]

    def layer(d_input: int, d_output: int) -> MoE:
        return build_moe(d_input, n_experts, d_expert, router=router, expert=expert, d_output=d_output, **options)

    return layer
