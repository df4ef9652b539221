"""The Triton kernels of decoding steps and norms, run by Triton's interpreter on CPU tensors, beside the float64
reference.

The interpreter must be asked for before anything imports the kernels: one test runs this file in a process of its own.
"""

import pytest
import torch
from against_reference import OUT, assert_close, rounding
from interpreted import interpret, interpreted, outside, set_sizes

from ssmzoo import ops
from ssmzoo.layers.mixers.mamba import Mamba
from ssmzoo.layers.mixers.mamba2 import Mamba2
from ssmzoo.layers.norm import RMSNorm
from ssmzoo.ops.in_place import states_in_place
from ssmzoo.ops.moe_dispatch import grouped_matmul_reference
from ssmzoo.ops.moe_dispatch import triton as grouped
from ssmzoo.ops.quantized_linear import pack_int4
from ssmzoo.ops.triton import MISSING
from ssmzoo.released.golden import relative_error

if MISSING is not None:
    pytest.skip(MISSING, allow_module_level=True)
HALVES = [torch.float32, torch.bfloat16, torch.float16]


@outside
def test_all_of_this_file_through_the_interpreter():
    interpret(__file__)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several programs and passes at sizes that an interpreter can do; memory that is not written is NaN."""
    from ssmzoo.ops.causal_conv1d import triton as convolution
    from ssmzoo.ops.gated_delta_step import triton as gated_delta_step
    from ssmzoo.ops.mamba2_step import triton as mamba2_step
    from ssmzoo.ops.mamba3_step import triton as mamba3_step
    from ssmzoo.ops.mamba_step import triton as mamba_step
    from ssmzoo.ops.rms_norm import triton as norm
    from ssmzoo.ops.selective_state_update import triton as update

    set_sizes(
        monkeypatch,
        (update, dict(TILE=16)),
        (convolution, dict(UPDATE_TILE=16, SHORT=2)),
        (mamba_step, dict(ROWS=4, COLUMNS=8, STATES=16)),
        (mamba2_step, dict(STATES=16)),
        (mamba3_step, dict(STATES=16)),
        (gated_delta_step, dict(STATES=16)),
        (norm, dict(TILE=16, PROGRAMS=2)),
    )
    torch.manual_seed(0)
    poison(monkeypatch)


def poison(monkeypatch):
    empty_like, new_empty = torch.empty_like, torch.Tensor.new_empty
    nan = lambda t: t.fill_(float("nan")) if t.is_floating_point() else t  # noqa: E731
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: nan(empty_like(*a, **k)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: nan(new_empty(*a, **k)))


def compare(function, call: dict, *states: str) -> None:
    """Results and the named states, which are changed in place, are those of the reference in float64, rounded once."""

    def run(backend, dtype=None):
        def given(name, t):
            if not torch.is_tensor(t) or not t.is_floating_point():
                return t
            return t.to(dtype or t.dtype, copy=True) if dtype or name in states else t

        call_ = {name: given(name, t) for name, t in call.items()}
        with ops.backend(backend), torch.no_grad():
            results = function(**call_)
        results = results if isinstance(results, tuple) else (results,)
        return [*results, *(call_[name] for name in states)]

    for got, expected in zip(run("triton"), run("reference", torch.float64), strict=True):
        assert got.isfinite().all()
        most = OUT if got.dtype == torch.float32 else rounding(got.dtype, 2)  # the interpreter rounds towards zero
        assert relative_error(got, expected) < most


def update_call(b, heads, e, n, groups, options, dtype, rows=None):
    H = () if heads is None else (heads,)
    held = b if rows is None else b + 2
    call = dict(
        state=torch.randn(held, *H, e, n),
        x=torch.randn(b, *H, e).to(dtype),
        dt=torch.randn(b, *H, e).to(dtype),
        A=-3 * torch.rand(*H, e, n),
        B=torch.randn(b, groups, n).to(dtype) if groups else torch.randn(b, n).to(dtype),
        C=torch.randn(b, groups, n).to(dtype) if groups else torch.randn(b, n).to(dtype),
        dt_softplus=bool(options),
    )
    extra = dict(D=torch.randn(*H, e), z=torch.randn(b, *H, e).to(dtype), dt_bias=torch.randn(*H, e))
    return call | {k: extra[k] for k in options.split()} | dict(state_batch_indices=rows)


@interpreted
@pytest.mark.parametrize(
    "b, heads, e, n, groups, options, dtype, rows",
    [
        (2, None, 5, 3, None, "", torch.float32, None),
        (2, None, 6, 17, 3, "D z dt_bias", torch.bfloat16, [3, -1]),
        (1, 4, 3, 5, 2, "D z dt_bias", torch.float16, None),
        (3, 2, 4, 1, 1, "D", torch.float32, [1, 0, 4]),
    ],
)
def test_state_update_is_the_definition(b, heads, e, n, groups, options, dtype, rows):
    rows = None if rows is None else torch.tensor(rows, dtype=torch.int32)
    compare(ops.selective_state_update, update_call(b, heads, e, n, groups, options, dtype, rows), "state")


@interpreted
@pytest.mark.parametrize("dtype", HALVES)
def test_state_update_of_heads(dtype):
    b, h, p, n = 2, 3, 5, 4
    x, dt, B, C, z = (torch.randn(s).to(dtype) for s in [(b, h, p), (b, h), (b, 1, n), (b, 1, n), (b, h, p)])
    call = dict(state=torch.randn(b, h, p, n), x=x, dt=dt, A=-torch.rand(h), B=B, C=C, D=torch.randn(h), z=z)
    compare(ops.ssd_state_update, call | dict(dt_bias=torch.randn(h), dt_softplus=True), "state")


@interpreted
def test_a_row_that_does_not_exist_is_refused():
    rows = torch.tensor([0, 9])
    with ops.backend("triton"), torch.no_grad(), pytest.raises(IndexError, match="row 9 of a state with 4 rows"):
        ops.selective_state_update(**update_call(2, None, 2, 2, None, "", torch.float32, rows))


@interpreted
@pytest.mark.parametrize(
    "b, c, l, k, s, circular, rows, bias, activation, dtype",
    [
        (2, 5, None, 4, 4, False, None, True, "silu", torch.float32),
        (2, 3, 1, 3, 5, False, [2, -1], False, None, torch.bfloat16),
        (1, 2, 7, 4, 3, False, None, True, "silu", torch.float16),
        (2, 3, 3, 4, 6, True, None, True, "swish", torch.float32),
        (2, 2, 9, 3, 4, True, [-1, 1], False, "silu", torch.float32),  # longer than what is kept
        (1, 2, 2, 1, 0, False, None, True, None, torch.float32),
    ],
)
def test_convolution_update_is_the_definition(b, c, l, k, s, circular, rows, bias, activation, dtype):
    x = torch.randn(b, c) if l is None else torch.randn(b, l, c).transpose(1, 2)
    call = dict(
        x=x.to(dtype),
        conv_state=torch.randn(b if rows is None else b + 2, c, s).to(dtype),
        weight=torch.randn(c, k),
        bias=torch.randn(c) if bias else None,
        activation=activation,
        cache_seqlens=torch.tensor([2, 11][:b], dtype=torch.int32) if circular else None,
        conv_state_indices=None if rows is None else torch.tensor(rows),
    )
    compare(ops.causal_conv1d_update, call, "conv_state")


def mixer_call(kind, b, dtype, projections=True, **shape):
    """The arguments of mamba_step or mamba2_step by the weights of a mixer."""
    mixer = kind(**shape).requires_grad_(False)
    for p in mixer.parameters():
        p += 0.2 * torch.randn_like(p)
    i, o, conv = mixer.in_proj, mixer.out_proj, mixer.conv1d
    shared = dict(conv_weight=conv.weight.squeeze(1), conv_bias=conv.bias, A_log=mixer.A_log, D=mixer.D)
    if kind is Mamba:
        u = torch.randn(b, mixer.d_model if projections else 2 * mixer.d_inner)
        state = dict(
            conv_state=torch.randn(b, mixer.d_inner, mixer.d_conv),
            ssm_state=torch.randn(b, mixer.d_inner, mixer.d_state),
        )
        dt = mixer.dt_proj
        shared |= dict(x_proj=mixer.x_proj.weight, dt_proj=dt.weight, dt_bias=dt.bias)
    else:
        u = torch.randn(b, mixer.d_model)
        state = dict(
            conv_state=torch.randn(b, mixer.widths[3], mixer.d_conv),
            ssm_state=torch.randn(b, mixer.nheads, mixer.headdim, mixer.d_state),
        )
        norm = None if mixer.norm is None else mixer.norm.weight
        shared |= dict(dt_bias=mixer.dt_bias, norm_weight=norm, ngroups=mixer.ngroups, eps=1e-3, dt_min=0.1, dt_max=1.5)
    if projections:
        shared |= dict(in_proj=i.weight, in_bias=i.bias, out_proj=o.weight, out_bias=o.bias)
    call = dict(u=u) | state | shared
    kept = ("ssm_state", "A_log", "D", "dt_bias")
    return {k: t.to(dtype) if torch.is_tensor(t) and k not in kept else t for k, t in call.items()}


MAMBAS = [
    dict(d_model=9, d_state=3, d_conv=3, bias=True),
    dict(d_model=5, conv_bias=False, dt_rank=3),
    dict(d_model=6, d_state=2, d_conv=1, expand=1.5),
    dict(d_model=1, d_state=1, expand=1),
]


@interpreted
@pytest.mark.parametrize("shape", MAMBAS, ids=str)
def test_mamba_step_is_the_definition(shape):
    compare(ops.mamba_step, mixer_call(Mamba, 2, torch.float32, **shape))
    compare(ops.mamba_step, mixer_call(Mamba, 1, torch.float32, projections=False, **shape))


@interpreted
@pytest.mark.parametrize(
    "shape",
    [
        dict(d_model=5, d_state=3, headdim=2, ngroups=1, bias=True),
        dict(d_model=6, d_state=9, headdim=3, ngroups=2, conv_bias=False, rmsnorm=False),
        dict(d_model=4, d_state=4, headdim=8, d_conv=3, D_has_hdim=True),
    ],
    ids=str,
)
def test_mamba2_step_is_the_definition(shape):
    compare(ops.mamba2_step, mixer_call(Mamba2, 2, torch.float32, **shape))


def mamba3_call(b, d, h, p, n, m, g=1, norm=True) -> dict:
    e, normal = h * p, torch.randn
    call = dict(u=normal(b, d), phase=6 * torch.rand(b, h, m), ssm_state=normal(b, h, p, n))
    call |= dict(last_k=normal(b, h, n), last_x=normal(b, h, p), in_proj=normal(2 * e + 2 * g * n + 3 * h + m, d))
    call |= dict(dt_bias=normal(h), B_norm=normal(n), C_norm=normal(n), B_bias=normal(h, n), C_bias=normal(h, n))
    return call | dict(D=normal(h), norm_weight=normal(e) if norm else None, out_proj=normal(d, e), ngroups=g)


def delta_call(b, d, h, j, n, p, k, narrow=False) -> dict:
    c, e, normal = 2 * j * n + h * p, h * p, torch.randn
    call = dict(u=normal(b, d), conv_state=normal(b, c, k), state=normal(b, h, n, p), conv_weight=normal(c, k))
    call |= dict(in_proj=normal(c + (2 * p + h if narrow else e + 2 * h), d), A_log=normal(h), out_proj=normal(d, e))
    call |= dict(dt_bias=normal(h * n if narrow else h), norm_weight=normal(p), num_heads=j, beta_scale=1.5)
    return call | (dict(f_proj=normal(h * n, p), g_proj=normal(e, p), g_bias=normal(e)) if narrow else {})


@interpreted
@pytest.mark.parametrize(
    "sizes", [(2, 5, 4, 5, 6, 2, 2), (1, 3, 2, 9, 7, 3, 1, False), (2, 2, 1, 1, 2, 1), (1, 4, 1, 3, 4, 2)], ids=str
)
def test_mamba3_step_is_the_definition(sizes):
    compare(ops.mamba3_step, mamba3_call(*sizes))


@interpreted
@pytest.mark.parametrize(
    "sizes",
    [(2, 5, 4, 2, 3, 7, 4), (1, 3, 2, 2, 5, 2, 1, True), (2, 2, 1, 1, 1, 1, 3), (2, 4, 3, 1, 2, 9, 2, True)],
    ids=str,
)
def test_gated_delta_step_is_the_definition(sizes):
    compare(ops.gated_delta_step, delta_call(*sizes))


@interpreted
@pytest.mark.parametrize("act_scale", [None, 0.02, "dynamic"])
@pytest.mark.parametrize(
    "bits, group, d, e, zeros, dtype",
    [(4, 4, 10, 5, True, torch.float32), (8, 7, 7, 9, False, torch.bfloat16), (8, 3, 19, 2, True, torch.float16)],
)
def test_products_with_integers_are_the_definition(bits, group, d, e, zeros, dtype, act_scale, monkeypatch):
    from ssmzoo.ops.quantized_linear import triton as quantized_linear

    set_sizes(monkeypatch, (quantized_linear, dict(ROWS=4, COLUMNS=4)))
    m = -(-d // group)
    codes = torch.randint(-8, 8, (e, d))
    call = dict(x=torch.randn(3, d).to(dtype), scale=torch.rand(e, m), bias=torch.randn(e).to(dtype))
    call |= dict(weight=pack_int4(codes) if bits == 4 else codes.to(torch.int8), bits=bits, group_size=group)
    call |= dict(zero=torch.randint(-3, 3, (e, m)).float() if zeros else None, act_scale=act_scale)
    compare(ops.quantized_linear, call)


@interpreted
@torch.no_grad()
@pytest.mark.parametrize("stream", [torch.float32, torch.bfloat16])
def test_a_stack_is_its_layers(stream):
    d, dtype = 6, torch.bfloat16 if stream == torch.bfloat16 else torch.float32
    mixers = [Mamba(d, d_state=3), Mamba2(d, d_state=3, headdim=4), Mamba(d, d_state=3)]
    layers, states = [], []
    for mixer in mixers:
        norm = RMSNorm(d)
        norm.weight += 0.1 * torch.randn(d)
        layer = mixer.layer(norm)
        layers.append(type(layer)(*[t.to(dtype) if torch.is_tensor(t) and t.ndim > 1 else t for t in layer]))
        c = mixer.conv1d.weight.shape[0]
        ssm = (mixer.d_inner, 3) if isinstance(mixer, Mamba) else (mixer.nheads, 4, 3)
        states.append((torch.randn(2, c, 4).to(stream), torch.randn(2, *ssm)))
    x = torch.randn(2, d).to(stream)
    double = lambda t: t.double() if torch.is_tensor(t) else t  # noqa: E731
    exact = [type(layer)(*map(double, layer)) for layer in layers]
    expected, after = ops.stack_step.reference(x.double(), exact, [tuple(map(double, s)) for s in states])
    with ops.backend("triton"):
        got, new = ops.stack_step(x, layers, states)
    most = OUT if stream == torch.float32 else rounding(stream, 3 * len(mixers))
    assert relative_error(got, expected) < most
    assert all(relative_error(a, b) < most for s, t in zip(new, after) for a, b in zip(s, t))


@interpreted
@torch.no_grad()
def test_states_are_advanced_in_place_on_request():
    for function, call, *names in (
        (ops.mamba_step, mixer_call(Mamba, 2, torch.float32, d_model=6, d_state=3), "conv_state", "ssm_state"),
        (
            ops.mamba2_step,
            mixer_call(Mamba2, 2, torch.float32, d_model=6, d_state=3, headdim=4),
            "conv_state",
            "ssm_state",
        ),
        (ops.mamba3_step, mamba3_call(2, 3, 2, 5, 3, 1), "phase", "ssm_state", "last_k", "last_x"),
        (ops.gated_delta_step, delta_call(2, 3, 2, 1, 3, 5, 2), "conv_state", "state"),
    ):
        before = {name: call[name].clone() for name in names}
        for backend in ("triton", "torch"):
            with ops.backend(backend):
                expected = function(**call | {k: t.clone() for k, t in before.items()})
                given = {k: t.clone() for k, t in before.items()}
                with states_in_place():
                    got = function(**call | given)
            for x, y in zip(got, expected):
                torch.testing.assert_close(x, y)
            if backend == "triton":
                assert all(t is given[name] for t, name in zip(got[1:], names, strict=True))
        assert all(torch.equal(call[k], t) for k, t in before.items())


@interpreted
def test_what_steps_cannot_serve_is_said():
    call = mixer_call(Mamba, 9, torch.float32, d_model=2, d_state=2)
    with ops.backend("triton"):
        with torch.no_grad(), pytest.raises(ops.BackendError, match="up to 8 sequences, got 9"):
            ops.mamba_step(**call)
        with pytest.raises(ops.BackendError, match="without gradients"):
            ops.mamba_step(**call)
        with pytest.raises(ops.BackendError, match="got float64"), torch.no_grad():
            ops.mamba_step(**{k: t if t is None else t[:2].double() if k == "u" else t for k, t in call.items()})
        state = update_call(1, None, 2, 2, None, "", torch.float32)
        state["x"].requires_grad_()
        with pytest.raises(ops.BackendError, match="no backward"):
            ops.selective_state_update(**state)


@interpreted
@pytest.mark.parametrize("shape", [(5, 3), (2, 3, 9), (1, 2), (0, 4), (70,)])
def test_norms_are_the_definition(shape):
    x, z, weight, bias = torch.randn(shape), torch.randn(shape), torch.randn(shape[-1:]), torch.randn(shape[-1:])
    assert_close(ops.rms_norm, dict(x=x, weight=weight, eps=1e-3), "triton")
    assert_close(ops.rms_norm, dict(x=x, weight=weight, eps=1e-3, residual=z), "triton")
    assert_close(ops.gated_layer_norm, dict(x=x, z=z, weight=weight, bias=bias, eps=1e-3), "triton")


@interpreted
@pytest.mark.parametrize("dtype", HALVES[1:2])
def test_norms_round_at_the_ends_only(dtype):
    rows, weight, bias = torch.randn(5, 4, 12).to(dtype), torch.randn(6), torch.randn(6)
    x, z = rows.chunk(2, dim=-1)  # rows apart in memory
    twice = dict(out=rounding(dtype, 2), grad=rounding(dtype, 4))  # the interpreter rounds towards zero
    for weights in (dict(weight=weight), dict(weight=weight.to(dtype))):
        assert_close(ops.rms_norm, dict(x=x) | weights, "triton", **twice)
        assert_close(ops.rms_norm, dict(x=x, residual=torch.randn(5, 4, 6)) | weights, "triton", **twice)
        (y, stream), _ = assert_close(ops.rms_norm, dict(x=x, residual=z) | weights, "triton", **twice)
        assert y.dtype == stream.dtype == dtype
        assert_close(ops.gated_layer_norm, dict(x=x, z=z, bias=bias.to(dtype)) | weights, "triton", **twice)


@interpreted
def test_norms_differentiate_twice_or_refuse_and_leave_wide_rows_to_torch():
    x = torch.randn(2, 4, requires_grad=True)
    with ops.backend("triton"):
        (gradient,) = torch.autograd.grad(ops.rms_norm(x, torch.ones(4)).square().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(gradient.square().sum(), x)
        assert second.isfinite().all()
        stream = ops.rms_norm(x, torch.ones(4), residual=x.detach())[1]
        (gradient,) = torch.autograd.grad(stream.sum(), x)  # of the second result alone
        torch.testing.assert_close(gradient, torch.ones_like(x))
        with pytest.raises(ops.BackendError, match="up to 8192 numbers on the chip, got 8193"):
            ops.rms_norm(torch.zeros(1, 8193), torch.ones(8193))


@interpreted
@pytest.mark.parametrize(
    "sizes, behind, dtype",
    [
        ([3, 0, 18, 1], 2, torch.float32),
        ([0, 0, 5], 0, torch.bfloat16),
        ([17], 3, torch.float16),
        ([0, 0], 4, torch.float32),
    ],
)
def test_products_of_groups_are_the_definition(sizes, behind, dtype, monkeypatch):
    for name, size in dict(ROWS=16, COLUMNS=16, INNER=16).items():
        monkeypatch.setattr(grouped, name, size)
    ends = torch.tensor(sizes).cumsum(0).int()
    rows, d, f, e = sum(sizes) + behind, 7, 19, len(sizes)
    x, y = torch.randn(rows, d).to(dtype), torch.randn(rows, f).to(dtype)
    weight = torch.randn(e, f, d).to(dtype).transpose(1, 2)
    most = 1e-6 if dtype == torch.float32 else rounding(dtype, 2)
    got, expected = grouped.multiply(x, weight, ends), grouped_matmul_reference(x.double(), weight.double(), ends)
    assert relative_error(got, expected) < most and not got[sum(sizes) :].any()
    sums, start = [], 0
    for end in ends.tolist():
        sums.append(x[start:end].double().T @ y[start:end].double())
        start = end
    assert relative_error(grouped.outer(x, y, ends), torch.stack(sums)) < most


@interpreted
@torch.no_grad()
def test_more_than_two_to_the_31_elements():
    """Indices are 64 bits wide: the second of two rows that lie 2^31 elements apart."""
    far, d = 2**31 + 5, 4

    def apart(*shape):
        t = torch.empty(far + 64, dtype=torch.float16).as_strided((2, *shape), (far, *torch.empty(shape).stride()))
        return t.copy_(torch.randn(t.shape))

    weight = torch.randn(d)
    state, x, conv = apart(d, 3).float(), apart(d), apart(d, 4)
    state = torch.empty(far + 64, dtype=torch.float16).as_strided((2, d, 3), (far, 3, 1)).copy_(state)
    with ops.backend("triton"):
        got = [ops.rms_norm(x, weight), ops.gated_layer_norm(x, x, weight, weight)]
        call = dict(x=x, dt=x, A=-torch.rand(d, 3), B=torch.ones(2, 3), C=torch.ones(2, 3))
        kept, window = state.clone(), conv.clone()
        got += [ops.selective_state_update(state, **call), ops.causal_conv1d_update(x, conv, torch.ones(d, 3))]
    with ops.backend("reference"):
        expected = [ops.rms_norm(x, weight), ops.gated_layer_norm(x, x, weight, weight)]
        expected += [ops.selective_state_update(kept, **call)]
        expected += [ops.causal_conv1d_update(x, window, torch.ones(d, 3))]
    weight = torch.randn(1, d, 3, dtype=torch.float16)
    x = torch.empty(far + 64, dtype=torch.float16).as_strided((3, d), (far // 2 + 1, 1)).copy_(torch.randn(3, d))
    for rows, matrix in ((x, weight), (x.T, weight[:, :3])):  # far from row to row, and from column to column
        ends = torch.tensor([len(rows)], dtype=torch.int32)
        got += [grouped.multiply(rows, matrix, ends), grouped.outer(rows, rows, ends)]
        expected += [rows @ matrix[0], (rows.T @ rows)[None]]
    for a, b in zip([*got, state, conv], [*expected, kept, window], strict=True):
        torch.testing.assert_close(a, b, rtol=3e-3, atol=1e-3)
