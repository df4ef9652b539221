"""Routing: which experts tokens choose, whether these answer strongest, and whether they go by the kind of token.

For every mixture of experts, token by token, of its first choice:

    share        how often an expert is the first choice
    strongest    share of tokens whose first choice has the largest norm |FF_e(x)| of all experts (1 / E by chance)
    correlation  of logits and norms over the experts, averaged over tokens
    information  I(kind; expert) / H(kind): how much of a token's kind its expert tells, 0 to 1

Logits are what the operator `router_logits` computes during a pass; norms come from sending every token to all experts.
t tokens, d width, e experts, c kinds.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ssmzoo.layers.feedforward.moe import MoE
from ssmzoo.layers.plain import observer
from ssmzoo.ops.dispatch import observe
from ssmzoo.probes.figures import canvas, heat
from ssmzoo.probes.subject import Finding

KINDS = ("letter", "capital", "digit", "space", "line end", "mark", "other")


@dataclass
class Choices:
    """One mixture: name of the module | logits (t e) | norms (t e) of what the experts answer."""

    name: str
    logits: Tensor
    norms: Tensor

    @property
    def first(self) -> Tensor:
        return self.logits.argmax(-1)

    @property
    def share(self) -> Tensor:
        return self.first.bincount(minlength=self.logits.shape[1]) / len(self.logits)

    @property
    def strongest(self) -> float:
        return float((self.first == self.norms.argmax(-1)).double().mean())

    @property
    def correlation(self) -> float:
        a, b = (v.double() - v.double().mean(-1, keepdim=True) for v in (self.logits, self.norms))
        return float(((a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1)).clamp(min=1e-12)).mean())


@torch.no_grad()
def choices(model: nn.Module, inputs: Tensor) -> list[Choices]:
    """One pass of the model in eval mode; the mixtures in the order of their calls.

    Raises ValueError when the model has no mixture of experts with a router of its own.
    """
    found: list[Choices] = []
    inside: list[tuple[str, MoE]] = []

    def look(call, x: Tensor, gate: Tensor):
        logits = call(x, gate)
        if inside:
            name, moe = inside[-1]
            x = x.reshape(-1, x.shape[-1])
            found.append(Choices(name, logits.reshape(len(x), -1), answers(moe, x)))
        return logits

    mixtures = [(name, m) for name, m in model.named_modules() if isinstance(m, MoE)]
    handles = []
    for name, m in mixtures:
        handles.append(m.register_forward_pre_hook(observer(lambda m, args, name=name: inside.append((name, m)))))
        handles.append(m.register_forward_hook(observer(lambda m, args, y: inside.pop() and None)))
    training = model.training
    try:
        with observe(router_logits=look):
            model.eval()(inputs)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    if not found:
        raise ValueError(
            f"routing looks at mixtures of experts, and {type(model).__name__} has none; it is for models such as "
            "moe_mamba and transformer_moe"
        )
    return found


def answers(moe: MoE, x: Tensor) -> Tensor:
    """Norms (t e) of what every expert makes of every token x (t d)."""
    bank, t = moe.expert_inner_function, len(x)
    weight = next(bank.parameters())
    norms = []
    for e in range(bank.n_experts):
        ends = torch.zeros(bank.n_experts, dtype=torch.int32, device=x.device)
        ends[e:] = t
        norms.append(bank(x.to(weight.dtype), ends).float().norm(dim=-1))
    return torch.stack(norms, dim=-1)


def kind_of(text: str) -> str:
    """The kind of a token by its text."""
    last = text[-1:]
    if last in ("\n", "\r"):
        return "line end"
    if not text.strip():
        return "space" if text else "other"
    text = text.strip()
    if text[0].isalpha():
        return "capital" if text[0].isupper() else "letter"
    return "digit" if text[0].isdigit() else "mark" if text[0].isascii() and text[0].isprintable() else "other"


def contingency(kind: Tensor, expert: Tensor, n_experts: int) -> Tensor:
    """How many tokens of every kind choose every expert first, (c e)."""
    return (kind * n_experts + expert).bincount(minlength=len(KINDS) * n_experts).view(len(KINDS), n_experts)


def information(counts: Tensor) -> float:
    """I(kind; expert) / H(kind) of counts (c e); 0 when there is one kind only."""
    joint = counts.double() / counts.sum()
    kind, expert = joint.sum(1), joint.sum(0)
    entropy = -torch.xlogy(kind, kind).sum()
    shared = torch.xlogy(joint, joint).sum() - torch.xlogy(kind, kind).sum() - torch.xlogy(expert, expert).sum()
    return float(shared / entropy) if entropy > 1e-12 else 0.0


def probe(subject) -> Finding:
    """Shares, strongest answers and specialisation of every mixture, over the text."""
    if subject.is_image or subject.classes is None:
        raise ValueError("routing reads texts: it applies to language models with experts, such as moe_mamba")
    layers = choices(subject.model, subject.inputs)
    kinds = torch.tensor([KINDS.index(kind_of(text)) for text in subject.classes])[subject.inputs.flatten().cpu()]
    finding = Finding({"tokens": f"{subject.inputs.numel()}"})
    rows, by_kind, matrices = [], [], []
    for layer in layers:
        counts = contingency(kinds, layer.first.cpu(), layer.logits.shape[1])
        p = layer.logits.softmax(-1).mean(0)
        for e, share in enumerate(layer.share.tolist()):
            rows.append((layer.name, e, f"{share:.4f}", f"{float(p[e]):.4f}", f"{float(layer.norms[:, e].mean()):.4g}"))
        matrix = counts / counts.sum(1, keepdim=True).clamp(min=1)
        by_kind += [(layer.name, k, int(n.sum()), *(f"{v:.4f}" for v in m)) for k, n, m in zip(KINDS, counts, matrix)]
        matrices.append(matrix)
        finding.summary[f"{layer.name}: first choice answers strongest (%), correlation, information on the kind"] = (
            f"{100 * layer.strongest:.1f} (by chance {100 / len(layer.share):.1f}), {layer.correlation:.3f}, "
            f"{information(counts):.3f}"
        )
    e = max(len(layer.share) for layer in layers)
    experts = tuple(f"expert {i}" for i in range(e))
    finding.tables["experts"] = (("layer", "expert", "share", "mean probability", "mean norm"), rows)
    finding.tables["kinds"] = (("layer", "kind", "tokens", *experts), by_kind)
    figure, axes = canvas(1, len(layers), (3.6, 3.2))
    for axis, layer, matrix in zip(axes[0], layers, matrices):
        heat(figure, axis, matrix, "expert", "", layer.name, label="share of first choices")
        axis.set_yticks(range(len(KINDS)), KINDS)
    finding.figures["routing"] = figure
    return finding
