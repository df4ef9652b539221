"""selective_state_update on our compiled CPU kernel (selective_state_update.c)."""

from __future__ import annotations

import torch
from torch import Tensor

from ssmzoo.ops.native import kernel, pack, why_not_float
from ssmzoo.ops.selective_scan import selective_state_update

UPDATE, MISSING = kernel("ssmzoo_selective_state_update")

_LIBRARY = torch.library.Library("ssmzoo", "FRAGMENT")
_LIBRARY.define(
    "selective_state_update(Tensor(a!) state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, "
    "Tensor? D, Tensor? z, Tensor? dt_bias, bool dt_softplus) -> Tensor"
)


def _update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus):
    out = torch.empty_like(x)
    shape, plain = state.shape, state.ndim == 3
    B, C = (M if M.dtype == torch.float32 else M.float() for M in (B, C))
    B, C = (M.unsqueeze(1) if M.ndim == 2 else M for M in (B, C))
    UPDATE(
        pack(
            [state, x, dt, A, B, C, D, z, dt_bias, out],
            shape[0],
            1 if plain else shape[1],
            shape[-2],
            shape[-1],
            B.shape[1],
            plain,
            dt_softplus,
            torch.get_num_threads(),
        )
    )
    return out


_LIBRARY.impl("selective_state_update", _update, "CPU")
torch.library.register_fake("ssmzoo::selective_state_update", lambda state, x, *_: torch.empty_like(x), lib=_LIBRARY)


def why_not(state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False) -> str | None:
    if state.dtype != torch.float32 or A.dtype != torch.float32:
        return "keeps state and A in float32"
    if state.stride(-1) != 1 or B.stride(-1) != 1 or C.stride(-1) != 1 or A.stride(-1) > 1:
        return "wants the states of a channel next to each other"
    given = (x, dt, B, C, D, z, dt_bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (state, A, *given)):
        return "has no backward; the torch backend does"
    return why_not_float(*given)


@selective_state_update.register("native", device="cpu", missing=MISSING, unsupported=why_not)
def _selective_state_update_native(state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False) -> Tensor:
    if type(x) is Tensor and type(state) is Tensor and not torch.compiler.is_compiling():
        return _update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus)  # 10 us less than through torch's dispatcher
    return torch.ops.ssmzoo.selective_state_update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus)
