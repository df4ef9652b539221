"""Relevance of every input for one logit by MambaLRP (its rules: lrp_rules.py), and integrated gradients beside it.

b batch, l length, d width.
Source: Rezaei Jafari et al. 2024 (arXiv 2406.07592); integrated gradients: Sundararajan et al. 2017 (arXiv 1703.01365).
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ssmzoo.probes.lrp_rules import ALL, rules


class Relevance(NamedTuple):
    """relevance (b l) of every position | gradient (b l d) it was made with | logit (b) explained | logits (b
    classes) | absorbed: what the biases of the model kept for themselves, summed over the batch."""

    relevance: Tensor
    gradient: Tensor
    logit: Tensor
    logits: Tensor
    absorbed: Tensor

    def conservation_error(self) -> float:
        """|relevances + what biases absorbed - logits| / |logits|, sums over the batch."""
        total = self.relevance.sum() + self.absorbed
        return float((total - self.logit.sum()).abs() / self.logit.abs().sum().clamp(min=1e-12))


def relevance(
    function: Callable[[Tensor], Tensor],
    model: nn.Module,
    embeddings: Tensor,
    target: Tensor,
    on: Collection[str] = ALL,
    **options,
) -> Relevance:
    """Relevance of every embedding for one logit.

    function    embeddings (b l d) -> logits (b classes) at the position that is read, using `model`
    target      (b) class or token to explain
    on          the rules; () gives plain gradient x input
    options     of `rules`

    Biases and learned initial states take part in a logit and keep relevance; time steps' biases take none (they are
    in constants of the scan).
    """
    if embeddings.dtype in (torch.float16, torch.bfloat16):
        raise ValueError(
            f"relevance needs float32 or float64, got {embeddings.dtype}, in which the stabiliser 1e-6 vanishes"
        )
    leaf = embeddings.detach().requires_grad_()
    biases = [p for name, p in model.named_parameters() if name.endswith(("bias", "init_states")) and p.requires_grad]
    with torch.enable_grad(), torch.autocast(leaf.device.type, enabled=False), rules(on, **options):
        logits = function(leaf)
        if logits.ndim != 2:
            raise ValueError(f"function must return logits (batch, classes), got {tuple(logits.shape)}")
        logit = logits.gather(1, target[:, None])[:, 0]
        gradient, *shares = torch.autograd.grad(logit.sum(), [leaf, *biases], allow_unused=True)
    gradient = torch.zeros_like(leaf) if gradient is None else gradient
    absorbed = sum(((p * g).sum().detach() for p, g in zip(biases, shares) if g is not None), gradient.new_zeros(()))
    return Relevance((leaf * gradient).sum(-1).detach(), gradient, logit.detach(), logits.detach(), absorbed)


def integrated_gradients(
    function, embeddings: Tensor, target: Tensor, steps: int = 32, baseline: Tensor | None = None
) -> Tensor:
    """Attribution (b l) along the straight line from `baseline` (zeros) to the embeddings.

    Midpoint rule in s with the point s^3 on the line: norms change fastest close to zero, which even steps would miss.
    """
    baseline = torch.zeros_like(embeddings) if baseline is None else baseline
    total = torch.zeros_like(embeddings)
    for i in range(steps):
        s = (i + 0.5) / steps
        leaf = (baseline + s**3 * (embeddings - baseline)).detach().requires_grad_()
        with torch.enable_grad():
            logit = function(leaf).gather(1, target[:, None]).sum()
            total += 3 * s**2 / steps * torch.autograd.grad(logit, leaf)[0]
    return ((embeddings - baseline) * total).sum(-1).detach()
