"""Cases of benchmarks/ops.py: selective_scan and causal_conv1d."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from ops import Case

from ssmzoo import ops
from ssmzoo.ops import native

B, D, N = 1, 1536, 16


def scan_inputs(length: int, channels: int = D, grad: bool = False) -> dict[str, torch.Tensor]:
    """A whole call with softplus and gate; sequences (b l d) in memory, as a Mamba block produces them."""
    rng = torch.Generator().manual_seed(0)

    def sequence(width):
        return torch.randn(B, length, width, generator=rng).transpose(1, 2)

    call = {
        "u": sequence(channels),
        "delta": sequence(channels),
        "A": -torch.arange(1.0, N + 1).repeat(channels, 1),
        "B": sequence(N),
        "C": sequence(N),
        "D": torch.ones(channels),
        "z": sequence(channels),
        "delta_bias": torch.full((channels,), -3.0),
    }
    return {name: t.requires_grad_(grad) for name, t in call.items()}


def ours(call, backend=None):
    with ops.backend(backend):
        return ops.selective_scan_fn(**call, delta_softplus=True)


def sequential(call):
    """The algorithm of mamba_ssm's selective_scan_ref: (b d l n) tensors, then a loop over time."""
    u, B, C = call["u"], call["B"], call["C"]
    delta = F.softplus(call["delta"] + call["delta_bias"][:, None])
    decay = torch.exp(torch.einsum("bdl,dn->bdln", delta, call["A"]))
    increment = torch.einsum("bdl,bnl,bdl->bdln", delta, B, u)
    state, ys = u.new_zeros(u.shape[0], u.shape[1], B.shape[1]), []
    for t in range(u.shape[2]):
        state = decay[:, :, t] * state + increment[:, :, t]
        ys.append(torch.einsum("bdn,bn->bd", state, C[:, :, t]))
    return (torch.stack(ys, 2) + u * call["D"][:, None]) * F.silu(call["z"])


def mambapy(call):
    """The whole call on mambapy's parallel scan."""
    from mambapy.pscan import pscan

    u, delta, B, C, z = (call[k].transpose(1, 2) for k in ("u", "delta", "B", "C", "z"))
    delta = F.softplus(delta + call["delta_bias"])
    hs = pscan(torch.exp(delta.unsqueeze(-1) * call["A"]), delta.unsqueeze(-1) * B.unsqueeze(2) * u.unsqueeze(-1))
    return (((hs @ C.unsqueeze(-1)).squeeze(3) + call["D"] * u) * F.silu(z)).transpose(1, 2)


def forward(function, length):
    def build():
        call = scan_inputs(length)
        return lambda: function(call)

    return build


def training(function, length, channels=D):
    def build():
        call = scan_inputs(length, channels, grad=True)
        weight = torch.randn_like(call["u"])
        return lambda: torch.autograd.grad(function(call), list(call.values()), weight)

    return build


MULTIPLY = {"avx512": 9, "avx2": 9}  # instructions per update that only a multiplier runs (benchmarks/assembly.py)
# What Intel's cores run on the same ports: additions and shifts; for AVX-512 shuffles, too, and a scaling counts twice
PORTS = {"avx512": 12, "avx2": 11}


def limit(counts: dict[str, int]):
    """As many multiply-adds as the scan's inner loop has such instructions, in registers, none waiting for another."""

    def build():
        kernel, missing = native.kernel("ssmzoo_multiply_adds")
        if native.LEVEL not in counts:
            raise SystemExit(missing or f"the instructions of the {native.LEVEL} kernels have not been counted")
        result = torch.empty(16)
        arguments = native.pack([], B * D * 512 * N * counts[native.LEVEL], torch.get_num_threads(), result.data_ptr())
        return lambda: (kernel(arguments), result)

    return build


def bare_forward():
    call = {k: v for k, v in scan_inputs(512).items() if k in ("u", "delta", "A", "B", "C")}
    call["delta"] = F.softplus(call["delta"])
    return lambda: ops.selective_scan_fn(**call)


def peak_memory(which: str, length: int, channels: int):
    """Megabytes that a forward and backward adds to a fresh process."""

    def build():
        command = [sys.executable, __file__, which, str(length), str(channels)]
        return lambda: float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])

    return build


def _print_peak_memory(which: str, length: int, channels: int) -> None:
    function = {"ssmzoo": ours, "mambapy": mambapy}[which]
    training(function, 64, channels)()()  # what is loaded once
    call = scan_inputs(length, channels, grad=True)
    before = _peak_rss()
    function(call).sum().backward()
    print(_peak_rss() - before)


def _peak_rss() -> float:
    """Megabytes; Linux's VmHWM, because ru_maxrss begins with the peak of the process that started this one."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 1024


def conv(channels_last: bool, module: bool):
    def build():
        rng = torch.Generator().manual_seed(0)
        x = torch.randn(B, 512, D, generator=rng).transpose(1, 2)
        x = x if channels_last else x.contiguous()
        layer = torch.nn.Conv1d(D, D, 4, groups=D, padding=3)
        leaves = [x.requires_grad_(), layer.weight, layer.bias]
        weight = torch.randn_like(x)

        def run():
            if module:
                y = F.silu(layer(x)[..., :512])
            else:
                y = ops.causal_conv1d_fn(x, layer.weight[:, 0], layer.bias, activation="silu")
            return torch.autograd.grad(y, leaves, weight)

        return run

    return build


CASES = [
    *(
        Case(
            f"scan forward (1, {D}, {length}, {N})",
            {
                "ssmzoo": forward(ours, length),
                "sequential loop": forward(sequential, length),
                "mambapy": forward(mambapy, length),
            },
            target=60,
            repeats=7,
            quick=length == 512,
        )
        for length in (512, 2048)
    ),
    Case(
        f"scan forward + backward (1, {D}, 512, {N})",
        {
            "ssmzoo": training(ours, 512),
            "ssmzoo, torch backend": training(lambda call: ours(call, "torch"), 512),
            "mambapy": training(mambapy, 512),
        },
        target=80,
        repeats=9,
        quick=True,
    ),
    Case(
        "scan forward without softplus and gate, against the vector unit",
        {
            "ssmzoo": bare_forward,
            "limit: multiplications alone": limit(MULTIPLY),
            "limit: all that Intel's multipliers run": limit(PORTS),
        },
        target=0.85,
        repeats=51,
        quick=True,
    ),
    Case(
        "scan forward + backward, 256 channels, 16k steps, memory",
        {"ssmzoo": peak_memory("ssmzoo", 16384, 256), "mambapy": peak_memory("mambapy", 16384, 256)},
        target=10,
        unit="MB",
    ),
    Case(
        "scan forward + backward, 256 channels, by length",
        {f"{length // 1024}k steps": training(ours, length, 256) for length in (1024, 4096, 16384, 65536, 262144)},
        repeats=5,
    ),
    *(
        Case(
            f"conv forward + backward (1, {D}, 512), {name}",
            {"ssmzoo": conv(last, False), "torch.nn.Conv1d + silu": conv(last, True)},
            target=3,
            repeats=31,
            quick=last,
        )
        for name, last in (("channels first", False), ("channels last", True))
    ),
]

if __name__ == "__main__":
    _print_peak_memory(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
