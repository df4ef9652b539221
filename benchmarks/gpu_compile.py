"""Compile what a launcher launches, for GPUs that are not there, and read what came out.

    for kernel in launched("sm_90", run): kernel.registers, kernel.counts(...)

A stand-in for Triton's driver names the target; every launch is compiled (Triton's wheel holds ptxas, nvdisasm and
AMD's assembler), recorded and not run.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import io
import math
import re
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch


class Target(NamedTuple):
    """shared: bytes a block may have; shared_all, registers (of 32 bits), warps: what a multiprocessor has; lanes: of a
    warp; most: registers a thread may have."""

    name: str
    card: str
    shared: int
    shared_all: int
    registers: int = 65536
    warps: int = 64
    lanes: int = 32
    most: int = 255


TARGETS = {
    target.name: target
    for target in (
        Target("sm_80", "A100", 163 << 10, 164 << 10),
        Target("sm_90", "H100, H200", 227 << 10, 228 << 10),
        Target("sm_100", "B200", 227 << 10, 228 << 10),
        Target("sm_120", "RTX 5090", 99 << 10, 100 << 10, warps=48),
        Target("gfx942", "MI300X", 64 << 10, 64 << 10, registers=131072, warps=32, lanes=64, most=512),
    )
}
NVIDIA = {  # kinds of instructions by their names; the first that fits
    "exponential": r"MUFU\.EX2",
    "special": r"MUFU",
    "matrix": r"[A-Z]*MMA",
    "multiply-add": r"F(FMA|MUL|ADD)2?|HFMA2|HADD2|HMUL2",
    "global load": r"LDG|UTMALDG|LDGSTS",
    "global store": r"STG|UTMASTG|RED|ATOM",
    "shared": r"LDS|STS|STSM|LDSM|ATOMS|LDT|STT",
    "local": r"LDL|STL",
    "shuffle": r"SHFL",
    "barrier": r"BAR|WARPSYNC|SYNCS|DEPBAR|LDGDEPBAR",
}
AMD = {
    "exponential": r"v_exp_f32",
    "special": r"v_(rcp|rsq|log|sqrt|sin|cos)_",
    "matrix": r"v_s?mfma",
    "multiply-add": r"v_(pk_)?(fma|fmac|mul|add|sub|subrev|mac)_(legacy_)?f(32|16)(?!.*(row_|quad_perm|wave_))",
    "global load": r"(global|buffer)_load",
    "global store": r"(global|buffer)_(store|atomic)",
    "local": r"scratch_",
    "shuffle": r"ds_bpermute|ds_permute|ds_swizzle|v_permlane|v_readlane|v_\w+.*(row_|quad_perm|wave_)",
    "shared": r"ds_",
    "barrier": r"s_barrier",
}
KINDS = tuple(NVIDIA)


@dataclass
class Launched:
    """One kernel as it was compiled, and how it was launched."""

    kernel: str
    target: str
    programs: int
    arguments: dict[str, object]  # of the launch, by name
    num_warps: int
    registers: int
    spilled: int  # bytes per thread on NVIDIA, registers on AMD
    stack: int
    shared: int
    code: list[tuple[str, int]]  # (instruction, how many loops are around it)

    def counts(self, depth: int, deepest: int) -> collections.Counter[str]:
        """Instructions of each kind in loops of that depth, "all" of them included; packed ones count twice among the
        multiply-adds. What lies deeper than the `deepest` loop (waiting, code put out of line) belongs to that."""
        table = AMD if self.target.startswith("gfx") else NVIDIA
        found: collections.Counter[str] = collections.Counter()
        for text, there in self.code:
            if min(there, deepest) == depth:
                kind = next((k for k, pattern in table.items() if re.match(pattern, text)), "other")
                found[kind] += 2 if kind == "multiply-add" and re.match(r"F\w+2|H\w+2|v_pk", text) else 1
                found["all"] += 1
        return found

    @property
    def depth(self) -> int:
        return max((depth for _, depth in self.code), default=0)

    @property
    def resident(self) -> int:
        """Warps on a multiprocessor at once, by registers and shared memory."""
        t = TARGETS[self.target]
        by_registers = t.registers // (max(8, -(-self.registers // 8) * 8) * t.lanes)
        blocks = min(by_registers, t.warps) // self.num_warps
        return self.num_warps * (min(blocks, t.shared_all // self.shared) if self.shared else blocks)

    @property
    def threads(self) -> int:
        return self.num_warps * TARGETS[self.target].lanes

    @property
    def bytes(self) -> int:
        """Of all tensors, each once."""
        return sum(t.numel() * t.element_size() for t in self.arguments.values() if isinstance(t, torch.Tensor))

    @property
    def key(self) -> tuple:
        """What two launches share that are compiled to the same code and work alike."""
        return self.kernel, self.num_warps, self.registers, self.shared, tuple(self.code)


class _Driver:
    """Enough of a driver to be asked which GPU there is."""

    def __init__(self, target):
        self.target = target

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return self.target.arch

    def get_current_stream(self, device):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")


@contextlib.contextmanager
def _compiling(target: str, record: Callable, known: set[str] | None) -> Iterator[None]:
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    nvidia = target.startswith("sm_")
    gpu = GPUTarget("cuda", int(target[3:]), 32) if nvidia else GPUTarget("hip", target, 64)
    run, previous = JITFunction.run, driver._active

    @functools.wraps(run)
    def compile_only(self, *args, grid, warmup=False, **kwargs):
        if known is not None:
            if self.fn.__name__ in known:
                return
            known.add(self.fn.__name__)
        if not nvidia:
            kwargs.pop("maxnreg", None)  # given where torch is a CUDA build
            kwargs["num_warps"] = min(kwargs["num_warps"], 16)  # of 64 lanes
        log = io.StringIO()
        with contextlib.redirect_stdout(log):
            kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        record(self, kernel, grid, dict(zip(self.arg_names, args)) | kwargs, log.getvalue())

    with tempfile.TemporaryDirectory() as folder, knobs.cache.scope(), knobs.nvidia.scope(), knobs.compilation.scope():
        knobs.cache.dir, knobs.nvidia.dump_ptxas_log, knobs.compilation.always_compile = folder, True, True
        driver.set_active(_Driver(gpu))
        JITFunction.run = compile_only
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield
        finally:
            JITFunction.run, driver._active = run, previous


def launched(target: str, run: Callable[[], object], known: set[str] | None = None) -> list[Launched]:
    """Every kernel that run() launches, compiled for the target; with `known` those whose names are not yet in it."""
    found: list[Launched] = []

    def record(function, kernel, grid, arguments, log):
        if (target, kernel.hash) not in _seen:  # Triton compiles once
            _seen[target, kernel.hash] = _read(kernel.asm, log)
        code, (registers, spilled, stack) = _seen[target, kernel.hash]
        found.append(
            Launched(
                function.fn.__name__,
                target,
                math.prod(grid),
                arguments,
                kernel.metadata.num_warps,
                registers,
                spilled,
                stack,
                kernel.metadata.shared,
                code,
            )
        )

    with _compiling(target, record, known):
        run()
    return found


_seen: dict[tuple[str, str], tuple[list[tuple[str, int]], tuple[int, int, int]]] = {}


def _read(asm: dict, log: str) -> tuple[list[tuple[str, int]], tuple[int, int, int]]:
    if "cubin" in asm:
        return _disassembled(asm["cubin"]), _ptxas(log)
    return _loops(asm["amdgcn"].splitlines(), amd=True), _amd(asm["amdgcn"])


def names(run: Callable[[], object]) -> set[str]:
    """The kernels that run() launches, without compiling them."""
    from triton.runtime.jit import JITFunction

    launch, found = JITFunction.run, set()

    def record(self, *args, **kwargs):
        found.add(self.fn.__name__)

    JITFunction.run = record
    try:
        run()
    finally:
        JITFunction.run = launch
    return found


def _ptxas(log: str) -> tuple[int, int, int]:
    """(registers, bytes spilled, bytes of stack) of what `ptxas -v` says of the last kernel."""
    registers = re.findall(r"Used (\d+) registers", log)
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    stack, stores, loads = map(int, spills[-1])
    return int(registers[-1]), max(stores, loads), stack


def _amd(text: str) -> tuple[int, int, int]:
    def value(name: str) -> int:
        return int(re.findall(rf"\.{name}:\s+(\d+)", text)[-1])

    return value("vgpr_count") + value("agpr_count"), value("vgpr_spill_count"), value("private_segment_fixed_size")


def _disassembled(cubin: bytes) -> list[tuple[str, int]]:
    import triton.backends.nvidia as nvidia

    program = Path(next(iter(nvidia.__path__))) / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([program, "-c", file.name], capture_output=True, text=True, check=True).stdout
    return _loops(text.splitlines(), amd=False)


def _loops(lines: list[str], amd: bool) -> list[tuple[str, int]]:
    """Instructions with the number of loops around them: a loop is what stands between a jump back and its target."""
    code: list[str] = []
    labels: dict[str, int] = {}
    for line in lines:
        if label := re.match(r"\s*(\.L[\w.]+):", line):
            labels[label[1]] = len(code)
        elif amd and (found := re.match(r"\s+([a-z]\w+\b.*?)\s*(?:;.*)?$", line)):
            code.append(found[1])
        elif not amd and (found := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][^;]*);", line)):
            code.append(found[1].strip())
    ends: dict[int, int] = {}
    for i, text in enumerate(code):
        target = re.match(r"s_c?branch\w*\s+(\.L\w+)" if amd else r"(?:BRA|JMP)\S*.*`\((\.L[\w.]+)\)", text)
        start = labels.get(target[1], i) if target else i
        if start < i:
            ends[start] = max(i, ends.get(start, 0))
    spans = [(start, end) for start, end in ends.items()]
    return [(text, sum(start <= i <= end for start, end in spans)) for i, text in enumerate(code)]
