"""Functions of mamba-ssm and causal-conv1d that join operators, against the equations written out step by step."""

import inspect
import math

import pytest
import test_drop_in_arguments
import torch
import torch.nn.functional as F
from against_reference import BACKENDS
from paths import ROOT

from ssmzoo import ops
from ssmzoo.released.golden import relative_error

REQUIRED = inspect.Parameter.empty
# Names in order with their defaults, as mamba-ssm 2.3.2 and causal-conv1d 1.7.0 have them; ours may have more behind.
UPSTREAM = {
    "selective_scan_fn": "u delta A B C D=None z=None delta_bias=None delta_softplus=False return_last_state=False",
    "mamba_inner_fn": (
        "xz conv1d_weight conv1d_bias x_proj_weight delta_proj_weight out_proj_weight out_proj_bias A B=None C=None "
        "D=None delta_bias=None B_proj_bias=None C_proj_bias=None delta_softplus=True checkpoint_lvl=1 "
        "b_rms_weight=None c_rms_weight=None dt_rms_weight=None b_c_dt_rms_eps=1e-6"
    ),
    "mamba_chunk_scan": "x dt A B C chunk_size D=None z=None dt_bias=None dt_softplus=False",
    "mamba_split_conv1d_scan_combined": (
        "zxbcdt conv1d_weight conv1d_bias dt_bias A D chunk_size initial_states=None seq_idx=None "
        "dt_limit=(0.0,math.inf) return_final_states=False activation='silu' rmsnorm_weight=None rmsnorm_eps=1e-6 "
        "outproj_weight=None outproj_bias=None headdim=None ngroups=1 norm_before_gate=True"
    ),
    "causal_conv1d_fn": (
        "x weight bias=None seq_idx=None initial_states=None return_final_states=False final_states_out=None "
        "activation=None"
    ),
    "causal_conv1d_varlen_states": "x cu_seqlens state_len",
}


def test_the_documented_table_is_true():
    """Every function with upstream's arguments in order; what ours has beyond is named in the last column."""
    upstream = UPSTREAM | test_drop_in_arguments.UPSTREAM
    names = {f"`{name}`" for name in upstream}
    rows = [line.split("|") for line in (ROOT / "docs" / "operators.md").read_text().splitlines()]
    table = {row[1].strip(" `"): row[2:4] for row in rows if len(row) == 5 and row[1].strip() in names}
    assert table.keys() == upstream.keys()
    for name, (arguments, beyond) in table.items():
        known = [argument.partition("=")[0] for argument in upstream[name].split()]
        assert arguments.strip(" `").split() == known
        more = inspect.signature(getattr(ops, name)).parameters.keys() - set(known)
        assert all(parameter in beyond for parameter in more)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("name", UPSTREAM)
def test_arguments_stand_in_upstreams_order(name):
    ours = inspect.signature(getattr(ops, name)).parameters.values()
    positional = [p for p in ours if p.kind == p.POSITIONAL_OR_KEYWORD]
    for argument, parameter in zip(UPSTREAM[name].split(), positional, strict=False):
        known, _, default = argument.partition("=")
        assert parameter.name == known
        assert parameter.default == (eval(default, {"math": math}) if default else REQUIRED)
    assert len(positional) >= len(UPSTREAM[name].split())


def randn(*shape):
    return torch.randn(shape, dtype=torch.float64)


def convolve(x, weight, bias, activation="silu"):
    """x (b c l), one output at a time."""
    k, y = weight.shape[-1], torch.zeros_like(x)
    for t in range(x.shape[2]):
        for j in range(k):
            if t - k + 1 + j >= 0:
                y[..., t] += weight[:, j] * x[..., t - k + 1 + j]
    y = y if bias is None else y + bias[:, None]
    return F.silu(y) if activation else y


def recurrence(x, dt, A, B, C, D):
    """x, dt (b e l), A (e n), B, C (b e n l), D (e) -> (b e l)"""
    h, ys = torch.zeros(*x.shape[:2], A.shape[1], dtype=B.dtype), []
    for t in range(x.shape[2]):
        h = torch.exp(dt[..., t, None] * A) * h + (dt * x)[..., t, None] * B[..., t]
        ys.append((h * C[..., t]).sum(-1) + (0 if D is None else D * x[..., t]))
    return torch.stack(ys, -1)


def norm(x, weight, eps=1e-6):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def inner_arguments(b=2, e=6, l=5, n=3, r=2, d=4, rms=False, given=False, biases=True):
    arguments = {
        "xz": randn(b, 2 * e, l),
        "conv1d_weight": randn(e, 1, 4),
        "conv1d_bias": randn(e) if biases else None,
        "x_proj_weight": randn(r + (n if given else 2 * n), e),
        "delta_proj_weight": randn(e, r),
        "out_proj_weight": randn(d, e),
        "out_proj_bias": randn(d) if biases else None,
        "A": -randn(e, n).exp(),
        "D": randn(e),
        "delta_bias": randn(e),
        "B_proj_bias": randn(n) if biases else None,
        "C_proj_bias": randn(n) if biases and not given else None,
    }
    if given:
        arguments["C"] = randn(b, n, l)
    if rms:
        arguments |= {"b_rms_weight": randn(n), "c_rms_weight": randn(n), "dt_rms_weight": randn(e)}
    return arguments


def inner(xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, out_proj_weight, out_proj_bias, A, D,
          delta_bias, B_proj_bias=None, C_proj_bias=None, C=None, b_rms_weight=None, c_rms_weight=None,
          dt_rms_weight=None):  # fmt: skip
    e, n, r = len(D), A.shape[1], delta_proj_weight.shape[1]
    x, z = xz[:, :e], xz[:, e:]
    x = convolve(x, conv1d_weight[:, 0], conv1d_bias)
    rows = x.transpose(1, 2) @ x_proj_weight.T  # (b l r+2n)
    dt, B = rows[..., :r] @ delta_proj_weight.T, rows[..., r : r + n]
    C = rows[..., r + n :] if C is None else C.transpose(1, 2)
    B, C = (M if bias is None else M + bias for M, bias in ((B, B_proj_bias), (C, C_proj_bias)))
    B, C, dt = (M if w is None else norm(M, w) for M, w in ((B, b_rms_weight), (C, c_rms_weight), (dt, dt_rms_weight)))
    B, C = (M.transpose(1, 2)[:, None].expand(-1, e, -1, -1) for M in (B, C))
    y = recurrence(x, F.softplus(dt.transpose(1, 2) + delta_bias[:, None]), A, B, C, D) * F.silu(z)
    y = y.transpose(1, 2) @ out_proj_weight.T
    return y if out_proj_bias is None else y + out_proj_bias


def compare(function, expected, arguments, backend, **options):
    """Results and gradients of `function` in float32 against those of `expected` in float64."""

    def run(call, dtype, **options):
        leaves = {k: t.to(dtype).requires_grad_() for k, t in arguments.items() if t is not None}
        rest = {k: None for k, t in arguments.items() if t is None}
        results = call(**leaves, **rest, **options)
        results = results if isinstance(results, tuple) else (results,)
        g = torch.Generator().manual_seed(1)
        loss = sum((r.double() * torch.randn(r.shape, generator=g, dtype=torch.float64)).sum() for r in results)
        return results, torch.autograd.grad(loss, list(leaves.values()))

    with ops.backend(backend):
        results, grads = run(function, torch.float32, **options)
    right, right_grads = run(expected, torch.float64)
    assert all(relative_error(a, b) < 1e-5 for a, b in zip(results, right, strict=True))
    assert all(relative_error(a, b) < 1e-4 for a, b in zip(grads, right_grads, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [{}, {"rms": True}, {"given": True}, {"biases": False, "e": 17, "l": 19, "n": 16}])
def test_mamba_inner(backend, options):
    compare(ops.mamba_inner_fn, inner, inner_arguments(**options), backend, checkpoint_lvl=0)


def test_mamba_inner_with_complex_A():
    arguments = inner_arguments(n=2, biases=False)
    arguments |= {"A": torch.complex(arguments["A"], randn(6, 2)), "x_proj_weight": randn(2 + 8, 6)}
    got = ops.mamba_inner_fn(**arguments)
    x = convolve(arguments["xz"][:, :6], arguments["conv1d_weight"][:, 0], None)
    rows = x.transpose(1, 2) @ arguments["x_proj_weight"].T
    dt = F.softplus(
        (rows[..., :2] @ arguments["delta_proj_weight"].T).transpose(1, 2) + arguments["delta_bias"][:, None]
    )
    B, C = (torch.view_as_complex(rows[..., s : s + 4].unflatten(-1, (2, 2)).contiguous()) for s in (2, 6))
    B, C = (M.transpose(1, 2)[:, None].expand(-1, 6, -1, -1) for M in (B, C))
    y = 2 * recurrence(x, dt, arguments["A"], B, C, None).real + arguments["D"][:, None] * x
    expected = (y * F.silu(arguments["xz"][:, 6:])).transpose(1, 2) @ arguments["out_proj_weight"].T
    torch.testing.assert_close(got, expected)


def split_arguments(b=2, l=7, h=4, p=3, g=2, n=3, m=0, d=None, rms=True, per_channel=True, initial=True):
    e = h * p
    width = m + e
    return {
        "zxbcdt": randn(b, l, 2 * m + 2 * e + 2 * g * n + h),
        "conv1d_weight": randn(e + 2 * g * n, 4),
        "conv1d_bias": randn(e + 2 * g * n),
        "dt_bias": randn(h),
        "A": -randn(h).exp(),
        "D": randn(h, p) if per_channel else randn(h),
        "initial_states": randn(b, h, p, n) if initial else None,
        "rmsnorm_weight": randn(e) if rms else None,
        "outproj_weight": None if d is None else randn(d, width),
        "outproj_bias": None if d is None else randn(d),
    }


def split(zxbcdt, conv1d_weight, conv1d_bias, dt_bias, A, D, initial_states, rmsnorm_weight, outproj_weight,
          outproj_bias, g, p, limit, before):  # fmt: skip
    h = len(A)
    e, n = h * p, (len(conv1d_weight) - h * p) // (2 * g)
    m = (zxbcdt.shape[-1] - 2 * e - 2 * g * n - h) // 2
    gate, up, z, xBC, dt = zxbcdt.split([m, m, e, e + 2 * g * n, h], -1)
    xBC = convolve(xBC.transpose(1, 2), conv1d_weight, conv1d_bias).transpose(1, 2)
    dt = F.softplus(dt + dt_bias).clamp(*limit)
    state = torch.zeros(len(z), h, p, n, dtype=torch.float64) if initial_states is None else initial_states
    ys = []
    for t in range(z.shape[1]):
        x = xBC[:, t, :e].reshape(-1, h, p)
        B, C = (xBC[:, t, e + i * g * n :][:, : g * n].reshape(-1, g, 1, n) for i in (0, 1))
        B, C = (M.expand(-1, g, h // g, n).reshape(-1, h, 1, n) for M in (B, C))
        a = dt[:, t, :, None, None]
        state = torch.exp(a * A[:, None, None]) * state + a * x[..., None] * B
        ys.append((state * C).sum(-1) + (D if D.ndim == 2 else D[:, None]) * x)
    y = torch.stack(ys, 1).flatten(2)
    if rmsnorm_weight is None:
        y = y * F.silu(z)
    else:
        y = y if before else y * F.silu(z)
        y = norm(y.unflatten(-1, (g, -1)), 1.0).flatten(-2) * rmsnorm_weight
        y = y * F.silu(z) if before else y
    y = torch.cat([F.silu(gate) * up, y], -1)
    return y if outproj_weight is None else y @ outproj_weight.T + outproj_bias, state


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rms": False, "per_channel": False},
        {"m": 2, "d": 5, "g": 1},
        {"m": 3, "rms": False, "h": 2, "p": 17, "n": 5, "l": 70, "g": 1, "initial": False},
    ],
)
def test_mamba_split_conv1d_scan(backend, options, before):
    known = {"g": options.get("g", 2), "p": options.get("p", 3), "limit": (0.1, 2.0), "before": before}
    compare(
        ops.mamba_split_conv1d_scan_combined,
        lambda **leaves: split(**leaves, **known),
        split_arguments(**options),
        backend,
        chunk_size=4,
        return_final_states=True,
        headdim=known["p"],
        ngroups=known["g"],
        dt_limit=known["limit"],
        norm_before_gate=before,
    )


def test_split_with_packed_documents_equals_the_documents():
    arguments = split_arguments(b=1, l=9, initial=False)
    seq_idx = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 1]])
    options = {"chunk_size": 4, "ngroups": 2}
    whole = ops.mamba_split_conv1d_scan_combined(**arguments, **options, seq_idx=seq_idx)
    rest = {k: t for k, t in arguments.items() if k != "zxbcdt"}
    parts = [
        ops.mamba_split_conv1d_scan_combined(part, **rest, **options) for part in arguments["zxbcdt"].split([4, 5], 1)
    ]
    torch.testing.assert_close(whole, torch.cat(parts, 1))


def test_mamba_chunk_scan_is_the_plain_scan():
    x, dt, A, B, C = randn(2, 9, 4, 3), randn(2, 9, 4), -randn(4).exp(), randn(2, 9, 2, 5), randn(2, 9, 2, 5)
    D, z, bias = randn(4), randn(2, 9, 4, 3), randn(4)
    expected = ops.mamba_chunk_scan_combined(x, dt, A, B, C, 4, D=D, z=z, dt_bias=bias, dt_softplus=True)
    torch.testing.assert_close(ops.mamba_chunk_scan(x, dt, A, B, C, 4, D, z, bias, True), expected)


@pytest.mark.parametrize("state_len", [1, 3, 8])
def test_varlen_states_are_the_last_inputs_of_every_sequence(state_len):
    x, lengths = randn(11, 3).requires_grad_(), [4, 0, 1, 6]
    states = ops.causal_conv1d_varlen_states(x, torch.tensor([0, 4, 4, 5, 11], dtype=torch.int32), state_len)
    assert states.shape == (4, 3, state_len)
    for part, state in zip(x.split(lengths), states):
        torch.testing.assert_close(state, F.pad(part.T, (state_len, 0))[:, -state_len:])
    (grad,) = torch.autograd.grad(states.sum(), x)
    kept = torch.cat([torch.arange(n, 0, -1) <= state_len for n in lengths])
    torch.testing.assert_close(grad, kept[:, None].double().expand(-1, 3))


def test_states_of_packed_prompts_go_on_by_updates():
    """Prefill packed, keep the states, decode: the same as every sequence alone."""
    x, weight, lengths = randn(9, 4), randn(4, 3), (2, 7)
    cu_seqlens = torch.tensor([0, 2, 9])
    state = ops.causal_conv1d_varlen_states(x, cu_seqlens, 3)
    new = randn(2, 4)
    got = ops.causal_conv1d_update(new, state, weight)
    for i, part in enumerate(x.split(lengths)):
        whole = torch.cat([part, new[i : i + 1]]).T[None]
        torch.testing.assert_close(got[i], ops.causal_conv1d_fn(whole, weight)[0, :, -1])


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("mamba_inner_fn", {"checkpoint_lvl": 2}, "checkpoint_lvl = 2, expected 0 or 1"),
        (
            "mamba_inner_fn",
            {"x_proj_weight": torch.zeros(7, 6)},
            r"x_proj_weight has shape \(7, 6\), expected \(r\+2n=8",
        ),
        ("mamba_inner_fn", {"xz": torch.zeros(2, 6, 5)}, r"xz has shape .* expected \(b=2, 2e=12, l\)"),
        ("mamba_split_conv1d_scan_combined", {"D": torch.zeros(4)}, "headdim is None"),
        ("mamba_split_conv1d_scan_combined", {"zxbcdt": torch.zeros(2, 7, 39)}, "zxbcdt has 39 features"),
        ("mamba_split_conv1d_scan_combined", {"outproj_bias": torch.zeros(4)}, "without outproj_weight"),
        ("causal_conv1d_varlen_states", {"state_len": 0}, "state_len = 0"),
        ("causal_conv1d_varlen_states", {"cu_seqlens": torch.zeros(3)}, "cu_seqlens has dtype torch.float32"),
    ],
)
def test_bad_arguments_are_named(name, change, message):
    good = {
        "mamba_inner_fn": inner_arguments,
        "mamba_split_conv1d_scan_combined": lambda: split_arguments() | {"chunk_size": 4, "ngroups": 2},
        "causal_conv1d_varlen_states": lambda: {"x": randn(4, 2), "cu_seqlens": torch.tensor([0, 4]), "state_len": 2},
    }[name]()
    with pytest.raises(ValueError, match=message):
        getattr(ops, name)(**good | change)


def test_forward_mode_equals_reverse_mode():
    arguments = {k: t for k, t in inner_arguments(rms=True).items() if t is not None}
    leaves = [t.requires_grad_() for t in arguments.values()]
    tangents = tuple(torch.randn_like(t) for t in leaves)

    def call(*tensors):
        return ops.mamba_inner_fn(**dict(zip(arguments, tensors))).square().sum()

    grads = torch.autograd.grad(call(*leaves), leaves)
    forward = torch.func.jvp(call, tuple(t.detach() for t in leaves), tangents)[1]
    torch.testing.assert_close(forward, sum((g * v).sum() for g, v in zip(grads, tangents)))
