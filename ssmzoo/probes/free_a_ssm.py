"""The one-layer selective SSM of the generalisation bound, whose decay may be growth.

    delta_t = softplus(p + q^T u_t)                one step for all channels, or 1
    x_t = exp(delta_t A) x_{t-1} + delta_t u_t (W_B u_t)^T,   y_t = x_t (W_C u_t);     logits = W y_T

No gate, convolution, norm or skip; A (e n) is the parameter itself, not -exp of it, so that its largest entry, the
spectral abscissa s_A, can be positive and decides whether the bound grows with the length.
The released code writes the softplus as log(1 + exp), which overflows above 88; here it is the stable one.

b batch, l length, d width, n state size.
Source: Honarpisheh et al. 2025 (arXiv 2502.01473), section 3, from its equations.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssmzoo.ops import selective_scan_fn


class FreeASSM(nn.Module):
    """u (b l d) -> y (b l d).

    d_model, d_state   d, n | s_A   the start value of A's first column, its largest entries (others: s_A - U(0, 10))
    use_delta          steps from the input; False: steps of 1
    fix_s_A            A is s_A everywhere and not trained
    """

    def __init__(self, d_model: int, d_state: int = 4, s_A: float = 0.0, use_delta: bool = True, fix_s_A: bool = False):
        super().__init__()
        if min(d_model, d_state) < 1:
            raise ValueError(f"FreeASSM needs positive sizes, got d_model={d_model}, d_state={d_state}")
        self.use_delta, self.s_A = use_delta, s_A
        A = torch.full((d_model, d_state), float(s_A))
        if fix_s_A:
            self.register_buffer("A", A)
        else:
            self.A = nn.Parameter(A)
        self.W_B, self.W_C = nn.Parameter(torch.empty(d_state, d_model)), nn.Parameter(torch.empty(d_state, d_model))
        self.q_delta, self.p_delta = nn.Parameter(torch.empty(d_model)), nn.Parameter(torch.empty(1))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """A as above; all else standard normal."""
        if isinstance(self.A, nn.Parameter):
            self.A.uniform_(self.s_A - 10, self.s_A)
            self.A[:, 0] = self.s_A
        for parameter in (self.W_B, self.W_C, self.q_delta, self.p_delta):
            nn.init.normal_(parameter)

    def step_size(self, u: Tensor) -> Tensor:
        """delta (b l)"""
        return F.softplus(self.p_delta + u @ self.q_delta) if self.use_delta else torch.ones_like(u[..., 0])

    def forward(self, u: Tensor) -> Tensor:
        delta = self.step_size(u)[:, None].expand(-1, u.shape[-1], -1)  # (b d l)
        B, C = ((u @ W.T).transpose(1, 2) for W in (self.W_B, self.W_C))
        y = selective_scan_fn(u.transpose(1, 2), delta, self.A, B, C).transpose(1, 2)
        if not torch.isfinite(y).all():
            raise FloatingPointError(
                f"the state overflowed over {u.shape[1]} tokens with s_A = "
                f"{self.A.max().item():.3g} > 0: "
                f"shorten the sequences or start from a smaller s_A"
            )
        return y


class FreeAClassifier(nn.Module):
    """ids (b l) -> (logits (b) or (b classes) from the last position, y (b l d)).

    vocab_size, d_model, d_state, s_A, use_delta, fix_s_A   see `FreeASSM`
    num_classes   None: one logit (binary)
    """

    def __init__(
        self,
        vocab_size: int,
        d_model: int = 4,
        d_state: int = 4,
        s_A: float = 0.0,
        use_delta: bool = True,
        fix_s_A: bool = False,
        num_classes: int | None = None,
    ):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, d_model)
        self.ssm = FreeASSM(d_model, d_state, s_A, use_delta, fix_s_A)
        self.W = nn.Parameter(torch.randn(d_model) if num_classes is None else torch.randn(num_classes, d_model))

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        y = self.ssm(self.embedding(ids))
        return F.linear(y[:, -1], self.W), y
