"""selective_state_update on our compiled CPU kernel (selective_state_update.c)."""

from __future__ import annotations

import torch
from torch import Tensor

from ssmzoo.ops.checks import why_not_float
from ssmzoo.ops.eager import eager, needs_grad
from ssmzoo.ops.library import in_place
from ssmzoo.ops.native import kernel, pack
from ssmzoo.ops.rows import checked
from ssmzoo.ops.selective_state_update import selective_state_update

UPDATE, MISSING = kernel("ssmzoo_selective_state_step")


def _update(a) -> Tensor:
    out = torch.empty_like(a.x)
    shape, plain = a.state.shape, a.state.ndim == 3
    B, C = (M if M.dtype == torch.float32 else M.float() for M in (a.B, a.C))
    B, C = (M.unsqueeze(1) if M.ndim == 2 else M for M in (B, C))
    heads = 1 if plain else shape[1]
    indices = checked(a.state_batch_indices, a.state)
    if indices is not None and indices.dtype not in (torch.int32, torch.int64):
        indices = indices.long()
    tensors = [a.state, a.x, a.dt, a.A, B, C, a.D, a.z, a.dt_bias, out, indices]
    sizes = a.x.shape[0], heads, shape[-2], shape[-1], B.shape[1]
    UPDATE(pack(tensors, *sizes, plain, a.dt_softplus, torch.get_num_threads()))
    return out


TRACED = in_place("selective_state_update", selective_state_update.Arguments, "state", _update, like="x")


def why_not(a) -> str | None:
    if a.state.dtype != torch.float32 or a.A.dtype != torch.float32:
        return "keeps state and A in float32"
    if a.state.stride(-1) != 1 or a.B.stride(-1) != 1 or a.C.stride(-1) != 1 or a.A.stride(-1) > 1:
        return "wants the states of a channel next to each other"
    given = (a.x, a.dt, a.B, a.C, a.D, a.z, a.dt_bias)
    return "has no backward; the torch backend does" if needs_grad(a.state, a.A, *given) else why_not_float(*given)


@selective_state_update.register("c", device="cpu", missing=MISSING, unsupported=why_not)
def selective_state_update_c(a) -> Tensor:
    return _update(a) if eager(a.x, a.state) else TRACED(*a)
