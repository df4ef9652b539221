"""One-token operators of Mamba-2, Mamba-3 and the delta rules: backends, definition and sequence form."""

import pytest
import torch
from against_reference import native

import ssmzoo.ops as ops
from ssmzoo.layers.mixers.gated_delta import GatedDeltaNet, KimiDeltaAttention
from ssmzoo.layers.mixers.mamba2 import Mamba2
from ssmzoo.models.mamba3 import Mamba3
from ssmzoo.ops.dispatch import BackendError
from ssmzoo.ops.mamba2_step.torch import by_updates

MIXERS = [
    (Mamba2, dict(d_model=16, d_state=8, headdim=8)),
    (Mamba2, dict(d_model=33, d_state=19, headdim=6, d_conv=3, bias=True, ngroups=11, norm_groups=1)),
    (Mamba2, dict(d_model=24, d_state=5, headdim=12, ngroups=2, D_has_hdim=True, conv_bias=False, rmsnorm=False)),
    (Mamba2, dict(d_model=40, d_state=33, headdim=20, dt_limit=(0.3, 0.6))),
    (Mamba2, dict(d_model=1, d_state=1, headdim=1, d_conv=1)),
    (Mamba3, dict(d_model=16, d_state=8, headdim=8)),
    (Mamba3, dict(d_model=33, d_state=19, headdim=6, ngroups=11, rope_fraction=1.0, is_outproj_norm=True)),
    (Mamba3, dict(d_model=24, d_state=33, headdim=24, A_floor=0.9)),
    (Mamba3, dict(d_model=1, d_state=2, headdim=1, rope_fraction=1.0)),
    (GatedDeltaNet, dict(d_model=17, num_heads=2, head_dim=5, num_v_heads=6, allow_neg_eigval=True)),
    (GatedDeltaNet, dict(d_model=32, num_heads=3, head_dim=16, conv_size=2)),
    (GatedDeltaNet, dict(d_model=1, num_heads=1, head_dim=1, expand_v=1, conv_size=1)),
    (KimiDeltaAttention, dict(d_model=24, num_heads=2, head_dim=19)),
    (KimiDeltaAttention, dict(d_model=16, num_heads=1, head_dim=4, expand_v=2, num_v_heads=3)),
]
OTHER = (Mamba2, dict(d_model=16, d_state=4, headdim=8, d_ssm=16, norm_before_gate=True))  # has no such operator
OPERATOR = {Mamba2: ops.mamba2_step, Mamba3: ops.mamba3_step}
each = pytest.mark.parametrize("kind, sizes", MIXERS, ids=str)


def called(kind, sizes, b: int = 2):
    """(operator, what a mixer hands to it for a token)"""
    torch.manual_seed(0)
    mixer = kind(**sizes).requires_grad_(False)
    for p in mixer.parameters():
        p += 0.2 * torch.randn_like(p)
    operator, seen = OPERATOR.get(kind, ops.gated_delta_step), []
    with torch.no_grad():
        state = mixer(torch.randn(b, 7, sizes["d_model"]))[1]
        with ops.observe(**{operator.__name__: lambda call, *a: seen.append(a) or call(*a)}):
            mixer(torch.randn(b, 1, sizes["d_model"]), state)
    return operator, list(seen[0])


def tensors(values: list) -> list[torch.Tensor]:
    return [v for v in values if isinstance(v, torch.Tensor)]


@native
@torch.no_grad()
@each
def test_c_is_the_definition(kind, sizes, monkeypatch):
    operator, args = called(kind, sizes)
    expected, before = operator.reference(*args), [t.clone() for t in tensors(args)]
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: empty_like(*a, **k).fill_(float("nan")))
    with ops.backend("c"):
        for got, e in zip(operator(*args), expected):
            torch.testing.assert_close(got, e, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(tensors(args), before))


@native
@torch.no_grad()
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    "b, sizes", [(1, dict(d_model=768)), (8, dict(d_model=640, bias=True)), (9, dict(d_model=36, headdim=9))], ids=str
)
def test_c_serves_wide_layers_batches_and_threads(b, sizes, threads, monkeypatch):
    """Weights are read once whatever the batch; against float64, with less than the rounding of fp32 sums."""
    operator, args = called(Mamba2, sizes, b)
    expected = operator.reference(*[a.double() if isinstance(a, torch.Tensor) else a for a in args])
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: empty_like(*a, **k).fill_(float("nan")))
    before, _ = torch.get_num_threads(), torch.set_num_threads(threads)
    try:
        with ops.backend("c"):
            for got, e in zip(operator(*args), expected):
                assert (got.double() - e).norm() <= 1e-6 * e.norm()
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
@pytest.mark.parametrize("kind, sizes", [m for m in MIXERS if m[0] is Mamba2], ids=str)
def test_the_two_update_operators_are_the_definition(kind, sizes):
    operator, args = called(kind, sizes)
    before = [t.clone() for t in tensors(args)]
    for got, e in zip(by_updates(operator.Arguments(*args)), operator.reference(*args)):
        torch.testing.assert_close(got, e, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(tensors(args), before))


@torch.no_grad()
@pytest.mark.parametrize("kind, sizes", [*MIXERS, OTHER], ids=str)
@pytest.mark.parametrize("backend", [None, "reference"])
def test_steps_are_the_sequence(kind, sizes, backend):
    torch.manual_seed(0)
    mixer = kind(**sizes)
    x = torch.randn(3, 6, sizes["d_model"])
    expected, last = mixer(x)
    state, ys = None, []
    with ops.backend(backend):
        for token in x.split(1, dim=1):
            y, state = mixer(token, state)
            ys.append(y)
    torch.testing.assert_close(torch.cat(ys, dim=1), expected, rtol=1e-4, atol=1e-5)
    for got, e in zip(state, last):
        torch.testing.assert_close(got, e, rtol=1e-4, atol=1e-5)


@native
@pytest.mark.parametrize("kind, sizes", [MIXERS[0], MIXERS[5], MIXERS[10]], ids=str)
def test_c_says_what_it_does_not_serve(kind, sizes):
    operator, args = called(kind, sizes)
    with ops.backend("c"):
        with pytest.raises(BackendError, match="without gradients"):
            operator(*args)
        with torch.no_grad(), pytest.raises(BackendError, match="float32"):
            operator(*[a.double() if isinstance(a, torch.Tensor) else a for a in args])
