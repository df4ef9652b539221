"""Where a language model's residual stream is read and written: what rotations and fused norms have to follow.

    embedding -> x;   u = norm(x) read by the readers of a layer;   x + what its writers give;   head reads norm_f(x)

Readers are linear layers and routers, writers linear layers. The layers that are known: Mamba, Mamba-2 (and Mamba with
experts for projections), attention, gated and plain feed-forwards, mixtures of experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import nn
from torch.nn.utils import parametrize

from ssmzoo.layers.decoder import Block, Decoder, LanguageModel
from ssmzoo.layers.feedforward.mlp import ACTIVATIONS, FeedForward, GatedMLP
from ssmzoo.layers.feedforward.moe import Experts, MoE
from ssmzoo.layers.feedforward.router import Router
from ssmzoo.layers.mixers.attention import MHA, Attention
from ssmzoo.layers.mixers.mamba import Mamba
from ssmzoo.layers.mixers.mamba2 import Mamba2
from ssmzoo.layers.quantized import QuantizedConv1d, QuantizedEmbedding, QuantizedLinear, SeparateExperts

QUANTISED = (QuantizedLinear, QuantizedEmbedding, QuantizedConv1d)


@dataclass
class Sides:
    """Modules of one layer that read the normed stream, and that write to the stream; mixers: those with an online
    rotation before their writer."""

    readers: list[nn.Module] = field(default_factory=list)
    writers: list[nn.Linear] = field(default_factory=list)
    online: list[nn.Linear] = field(default_factory=list)


@dataclass
class Group:
    """One norm and the layers that read what it gives. name: of the norm in the model; block: its number"""

    name: str
    norm: nn.Module
    sides: Sides
    block: int


@dataclass
class Skeleton:
    """A language model's parts; `norm` and its name are None and "" where a model has no final norm."""

    decoder: Decoder
    embedding: nn.Embedding
    blocks: list[Block]
    head: nn.Linear
    norm: nn.Module | None
    names: dict[int, str]

    @property
    def tied(self) -> bool:
        return self.head.weight is self.embedding.weight

    @property
    def norm_name(self) -> str:
        return "" if self.norm is None else self.names[id(self.norm)]

    def groups(self) -> Iterator[Group]:
        for i, block in enumerate(self.blocks):
            group = None
            for name, norm, layer in block.sublayers():
                sides = sides_of(layer, f"block {i}, {name}")
                if norm is None:
                    for own, more in zip(vars(group.sides).values(), vars(sides).values()):
                        own.extend(more)
                    continue
                if group is not None:
                    yield group
                group = Group(self.names[id(norm)], norm, sides, i)
            yield group


def skeleton(model: nn.Module) -> Skeleton:
    """The parts of a language model; ValueError for other models, with what can be done."""
    decoder = next((m for m in model.modules() if isinstance(m, Decoder)), None)
    if not isinstance(model, LanguageModel) or decoder is None or not isinstance(decoder.embedding, nn.Embedding):
        raise ValueError(
            f"{type(model).__name__} is no language model of embedding, blocks and head, so nothing can be rotated or "
            "reordered in it; its linear layers can be quantised alone (--no-rotate --no-reorder)"
        )
    names = {id(m): name for name, m in model.named_modules()}
    blocks, norm = list(getattr(decoder, decoder.blocks_name)), getattr(decoder, decoder.norm_name)
    return Skeleton(decoder, decoder.embedding, blocks, getattr(model, model.head_name), norm, names)


def refuse_quantised(model: nn.Module) -> None:
    """Raise ValueError for a model that holds quantised layers, or weights that are functions of other tensors."""
    for name, module in model.named_modules():
        if isinstance(module, QUANTISED):
            raise ValueError(
                f"the model is quantised already ({name} holds {module.bits if hasattr(module, 'bits') else 8}-bit "
                "weights); start from the checkpoint it was made of"
            )
        if parametrize.is_parametrized(module):
            raise ValueError(f"{name} has parametrised weights, which cannot be replaced by integers; merge them first")


def separate_experts(model: nn.Module) -> nn.Module:
    """Banks of experts become one linear layer per expert and matrix, in place; the function is the same."""
    for name, module in list(model.named_modules()):
        if type(module) is Experts:
            model.set_submodule(name, separated(module))
    return model


def separated(bank: Experts) -> SeparateExperts:
    n, d, f = bank.lin1_weight.shape
    act = next((k for k, v in ACTIVATIONS.items() if v is bank.activation), None)
    out = f if act is None else bank.lin2_weight.shape[2]
    made = SeparateExperts(n, d, f, out, act, bank.gate_weight is not None).to(bank.lin1_weight)
    banks = {"lin1": bank.lin1_weight, "lin2": getattr(bank, "lin2_weight", None), "gate": bank.gate_weight}
    for part, stacked in banks.items():
        if stacked is not None:
            for linear, weight in zip(getattr(made, part), stacked.detach()):
                linear.weight.data = weight.T.contiguous()
    return made.train(bank.training)


def sides_of(layer: nn.Module, where: str) -> Sides:
    """Readers and writers of a sublayer; ValueError for a kind of layer that is not known."""
    if isinstance(layer, Mamba):
        inside = layer.in_proj
        if isinstance(inside, nn.Linear):
            readers = [inside]
        else:
            readers = [m for part in inside.children() for m in projection(part, where).readers]
        out = layer.out_proj
        return Sides(readers, projection(out, where).writers, [out] if type(out) is nn.Linear else [])
    if isinstance(layer, Mamba2):
        return Sides([layer.in_proj], [layer.out_proj], [layer.out_proj])
    if isinstance(layer, MHA):
        return Sides([layer.in_proj], [layer.out_proj])
    if isinstance(layer, Attention):
        return Sides([layer.input_projection], [layer.output_projection])
    if isinstance(layer, (FeedForward, GatedMLP)):
        return Sides([layer.fc1], [layer.fc2])
    if isinstance(layer, MoE):
        return projection(layer, where)
    raise ValueError(
        f"{where} is {type(layer).__name__}, whose reading and writing of the residual stream is not known here, so it "
        "cannot be rotated; quantise without rotation (--no-rotate, rotate=False)"
    )


def projection(module: nn.Module, where: str) -> Sides:
    """A linear layer, or a mixture of experts in its place."""
    if isinstance(module, nn.Linear):
        return Sides([module], [module])
    if not isinstance(module, MoE) or module.ln is not None:
        kind = "a mixture with a norm behind it" if isinstance(module, MoE) else type(module).__name__
        raise ValueError(f"{where} holds {kind}, which cannot be rotated; quantise without rotation (--no-rotate)")
    router, more = module.gating, [n for n, _ in module.gating.named_parameters() if n not in ("gate", "gate_bias")]
    if not isinstance(router, Router) or more:
        raise ValueError(
            f"{where}: the router {type(router).__name__} has weights {', '.join(more)} that cannot be rotated; "
            "quantise without rotation (--no-rotate)"
        )
    sides = Sides([router])
    for bank in module.expert_inner_function.modules():
        if isinstance(bank, SeparateExperts):
            sides.readers += [*bank.lin1, *(bank.gate or ())]
            sides.writers += bank.lin1 if bank.activation is None else bank.lin2
    if module.shared is not None:
        shared = sides_of(module.shared, where)
        sides.readers += shared.readers
        sides.writers += shared.writers
    return sides
