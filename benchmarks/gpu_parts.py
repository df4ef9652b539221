"""One part of benchmarks/gpu.py, in a process of its own: measures, and writes rows as they come.

python benchmarks/gpu_parts.py SECTION PART FILE MACHINE [--device cuda|cpu] [--toy]
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE), str(HERE.parent / "tests")]
import torch  # noqa: E402
from gpu_calls import DTYPES, LAYERS, TIMED  # noqa: E402

import ssmzoo  # noqa: E402
from ssmzoo import ops  # noqa: E402
from ssmzoo.released.golden import relative_error  # noqa: E402

BACKENDS = ("triton", "mamba_ssm", "torch")
# relative errors allowed (outputs, gradients); with 16 bits the gradient that comes in is rounded, too, and sums cancel
TOLERANCE = {"bf16": (1e-2, 5e-2), "fp16": (2e-3, 1e-2), "fp32": (1e-5, 1e-4)}
ROUNDED_INSIDE = 4  # torch's forms of 16-bit layers round between their operators; times the tolerance
SIZES = {"check": (2, 128, 300), "times": (8, 2048), "toy check": (1, 8, 20), "toy times": (1, 8)}


class Bench:
    def __init__(self, device: str, toy: bool, write: Callable[..., None], rows: list[dict]):
        self.device, self.toy, self.write, self.rows = device, toy, write, rows

    def card(self, part: str) -> None:
        size = 1 << (12 if self.toy else 30)
        a, b = (torch.empty(size, dtype=torch.uint8, device=self.device) for _ in range(2))
        copy = 2 * size / self.median(lambda: b.copy_(a)) / 1e6
        n = 64 if self.toy else 8192
        x = torch.randn(n, n, device=self.device, dtype=torch.bfloat16)
        product = 2 * n**3 / self.median(lambda: x @ x) / 1e9
        memory = torch.cuda.get_device_properties(0).total_memory / 1e9 if self.device == "cuda" else 0
        self.write(copy_gb_s=round(copy, 1), product_tflop_s=round(product, 3), memory_gb=round(memory, 1))

    def check(self, part: str) -> None:
        for name, variant, function, make in small() if part == "small" else layers(self.toy):
            for dtype in list(DTYPES)[2 if self.toy and part == "small" else 0 :]:
                torch.manual_seed(0)
                call = {k: v.to(self.device) if torch.is_tensor(v) else v for k, v in make(DTYPES[dtype]).items()}
                try:
                    expected = gradients(function, "reference", call, torch.float64)
                except ops.BackendError:  # in float32 alone
                    continue
                for backend in BACKENDS:
                    row = dict(operator=name, variant=variant, dtype=dtype, backend=backend)
                    self.write(**row | compared(function, backend, call, expected, TOLERANCE[dtype]))

    def times(self, part: str) -> None:
        b, d = SIZES["toy times" if self.toy else "times"]
        copy = next((r["copy_gb_s"] for r in self.rows if "copy_gb_s" in r), None)
        for function, make, options, lengths, differentiable in TIMED[part]:
            for length in (16,) if self.toy else lengths:
                call = make(self.device, torch.bfloat16, b, d, length, **options)
                for training in (False, True)[: 1 + differentiable]:
                    self.time_one(function, call, options, length, training, copy)
                del call

    def time_one(self, function, call, options, length, training, copy) -> None:
        runs = {}
        for backend in BACKENDS if length <= 4096 else BACKENDS[:2]:  # PyTorch's forms fill the memory beyond
            run = runner(function, backend, call, training)
            with contextlib.suppress(ops.BackendError, torch.OutOfMemoryError):
                run()  # compiles
                runs[backend] = run
        if foreign := flash_linear_attention(function, call, training):
            runs["fla"] = foreign
        found = interleaved(runs, self.device, 3 if self.toy else 15)
        moved = sum(t.numel() * t.element_size() for t in call.values() if torch.is_tensor(t))
        moved += next(t.numel() * t.element_size() for t in call.values() if torch.is_tensor(t))  # the result
        moved *= 3 if training else 1  # arguments read, gradients read and written
        for backend, ms in found.items():
            rate = moved / ms / 1e6
            name = " + ".join([function.__name__, *(named(options) if options != {"last": True} else ())])
            dtype = "bf16" if any(getattr(t, "dtype", None) == torch.bfloat16 for t in call.values()) else "fp32"
            row = dict(operator=name, dtype=dtype, length=length, backend=backend, ms=round(ms, 4))
            row |= {"pass": "forward + backward" if training else "forward", "gb_s": round(rate, 1)}
            row["share_of_copy"] = f"{100 * rate / copy:.0f} %" if copy else ""
            row["times_torch"] = f"{found['torch'] / ms:.2f}" if "torch" in found else ""
            self.write(**row)

    def train(self, part: str) -> None:
        model, batch, loss, unit, items = training(part, self.device, self.toy)
        optimiser = torch.optim.AdamW(model.parameters(), 1e-4, fused=self.device == "cuda")
        cast = functools.partial(torch.autocast, self.device, torch.bfloat16)

        def step() -> torch.Tensor:
            with cast():
                value = loss(model, batch)
            value.backward()
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            return value

        from torch.utils.flop_counter import FlopCounterMode

        with FlopCounterMode(display=False) as counter, torch.no_grad(), cast():
            loss(model, batch)
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        for _ in range(1 if self.toy else 3):
            first = step()
        ms = self.median(step, 2 if self.toy else 8)
        peak = torch.cuda.max_memory_allocated() / 1e9 if self.device == "cuda" else 0
        product = next((r["product_tflop_s"] for r in self.rows if "product_tflop_s" in r), None)
        rate = 3 * counter.get_total_flops() / ms / 1e9  # a backward is two forwards; products that torch sees
        self.write(
            model=part,
            batch=str(tuple(next(iter(batch.values())).shape)),
            ms=round(ms, 2),
            items_per_s=round(1000 * items / ms),
            unit=unit,
            peak_gb=round(peak, 2),
            share_of_product=f"{100 * rate / product:.1f} %" if product else "",
            loss=round(first.item(), 4),
            verdict="ok" if first.isfinite() else "WRONG",
            operator=part,
        )

    def decode(self, part: str) -> None:
        from ssmzoo.inference import decoding
        from ssmzoo.inference.generate import prefill, stream

        model = build(part, self.toy).eval().to(self.device, torch.bfloat16 if self.device == "cuda" else torch.float32)
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        copy = next((r["copy_gb_s"] for r in self.rows if "copy_gb_s" in r), None)
        tokens, record = 4 if self.toy else 64, dict(decoding.RECORD)
        for how in ("graph", "plain calls") if self.device in record else ("plain calls",):
            decoding.RECORD.clear()
            decoding.RECORD.update(record if how == "graph" else {})
            for batch in (1, 2) if self.toy else (1, 8, 64, 256):
                prompts = torch.randint(1, 200, (batch, 16))
                if self.device == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                seconds = self.text(stream(model, prompts, tokens, greedy=True), tokens)
                state = prefill(model, prompts.to(self.device))[1]
                moved = weights + 2 * sum(t.numel() * t.element_size() for t in tensors(state))
                rate = moved / seconds / 1e9
                peak = torch.cuda.max_memory_allocated() / 1e9 if self.device == "cuda" else 0
                share = f"{100 * rate / copy:.0f} %" if copy else ""
                row = dict(model=part, batch=batch, how=how, tokens_per_s=round(batch / seconds), gb_s=round(rate, 1))
                self.write(**row, share_of_copy=share, peak_gb=round(peak, 2))

    @staticmethod
    def text(steps: Iterator, tokens: int) -> float:
        """Seconds per token, of the later half: the first ones compile and record."""
        for _ in range(tokens // 2):
            next(steps)
        start = time.perf_counter()
        for _ in range(tokens - tokens // 2):
            next(steps)
        return (time.perf_counter() - start) / (tokens - tokens // 2)

    def median(self, run: Callable, repeats: int = 10) -> float:
        """Milliseconds."""
        return interleaved({"it": run}, self.device, repeats)["it"]


def small() -> Iterator[tuple]:
    """Every operator, by the examples that the tests have."""
    from toy_operators import EXAMPLES

    for name, example in EXAMPLES.items():
        call, make = example()

        def made(dtype, make=make):
            return {k: t.to(dtype) if t.is_floating_point() else t for k, t in make().items()}

        yield name.partition(":")[0], name.partition(": ")[2], _on_device(call), made


def _on_device(call: Callable) -> Callable:
    """With the integers among its fixed arguments where the tensors lie."""

    def run(**tensors):
        device = next(iter(tensors.values())).device
        fixed = {k: v.to(device) if torch.is_tensor(v) else v for k, v in getattr(call, "keywords", {}).items()}
        return functools.partial(call.func, *call.args)(**tensors, **fixed)

    return run


def layers(toy: bool) -> Iterator[tuple]:
    sizes = SIZES["toy check" if toy else "check"]
    for name, (function, make, variants) in LAYERS.items():
        for variant in variants:

            def made(dtype, make=make, variant=variant):
                return make("cpu", dtype, *sizes, **variant)

            yield name, " ".join(named(variant)), function, made


def named(options: dict) -> list[str]:
    return [name if value is True else f"{name} {value}" for name, value in options.items()]


def gradients(function, backend: str, call: dict, dtype=None) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Results and gradients of a fixed loss, computed in `dtype` or in the arguments' own."""
    call = {
        k: v.detach().to(dtype or v.dtype).requires_grad_() if torch.is_tensor(v) and v.is_floating_point() else v
        for k, v in call.items()
    }
    leaves = [v for v in call.values() if torch.is_tensor(v) and v.requires_grad]
    with ops.backend(backend):
        out = function(**call)
    out = [t for t in (out if isinstance(out, tuple) else (out,)) if t.is_floating_point()]
    rng = torch.Generator().manual_seed(1)
    loss = sum((t.double() * torch.randn(t.shape, generator=rng).to(t.device)).sum() for t in out)
    return out, list(torch.autograd.grad(loss, leaves, materialize_grads=True))


def compared(function, backend: str, call: dict, expected: tuple, tolerance: tuple[float, float]) -> dict:
    """out, grad, verdict; without gradients where a backend has none."""
    grad = True
    try:
        got = gradients(function, backend, call)
    except ops.BackendError as error:
        if "no backward" not in str(error) and "without gradients" not in str(error):
            return dict(verdict=_why(error, backend))
        grad = False
        try:
            with torch.no_grad(), ops.backend(backend):
                out = function(**call)
        except ops.BackendError as again:
            return dict(verdict=_why(again, backend))
        got = [t for t in (out if isinstance(out, tuple) else (out,)) if t.is_floating_point()], []
    except RuntimeError as error:  # a kernel that cannot be compiled or launched
        return dict(verdict="WRONG", out=str(error).strip().partition("\n")[0][:100])
    errors = [max(map(relative_error, *pair), default=0.0) for pair in zip(got, expected)]
    loose = ROUNDED_INSIDE if backend == "torch" and tolerance != TOLERANCE["fp32"] else 1
    right = all(e < loose * limit for e, limit in zip(errors, tolerance))
    row = dict(out=f"{errors[0]:.1e}", grad=f"{errors[1]:.1e}" if grad else "none")
    return row | dict(verdict="ok" if right else "WRONG")


def _why(error: Exception, backend: str) -> str:
    lines = str(error).splitlines()
    return next((line.partition(": ")[2] for line in lines if line.strip().startswith(f"{backend}:")), lines[0])


def runner(function, backend: str, call: dict, training: bool) -> Callable[[], None]:
    """A function without arguments: forward, or forward and backward."""
    if training:
        call = {
            k: v.detach().requires_grad_() if torch.is_tensor(v) and v.is_floating_point() else v
            for k, v in call.items()
        }
    leaves = [v for v in call.values() if torch.is_tensor(v) and v.requires_grad]

    def run() -> None:
        with ops.backend(backend), torch.set_grad_enabled(training):
            out = function(**call)
        if training:
            out = out if isinstance(out, tuple) else (out,)
            torch.autograd.grad(out, leaves, [torch.ones_like(t) for t in out])

    return run


def flash_linear_attention(function, call: dict, training: bool) -> Callable[[], None] | None:
    """fla's RMS norm and delta rules, where it is installed and serves; its Mamba takes mamba-ssm's scan."""
    try:
        theirs, names = _of_fla(function, call)
        given = {name: call[name].detach().requires_grad_(training) for name in names}

        def run() -> None:
            out = theirs(**given)
            out = out[0] if isinstance(out, tuple) else out
            if training:
                torch.autograd.grad(out, list(given.values()), torch.ones_like(out))

        run()  # compiles
    except Exception:  # whatever a missing or broken install raises, or none of these functions
        return None
    return run


def _of_fla(function, call: dict) -> tuple[Callable, tuple[str, ...]]:
    """Their function, and which of our arguments it takes."""
    if function is ops.rms_norm and "residual" not in call:
        try:
            from fla.modules.norm.layernorm import rms_norm  # since 0.6
        except ImportError:
            from fla.modules.layernorm import rms_norm
        return functools.partial(rms_norm, bias=None, eps=1e-5), ("x", "weight")
    if function is ops.gated_delta_rule:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule
        from fla.ops.kda import chunk_kda

        rule = chunk_kda if call["g"].ndim == call["q"].ndim else chunk_gated_delta_rule
        return functools.partial(rule, scale=1.0), ("q", "k", "v", "g", "beta")  # our q is scaled
    raise NotImplementedError


def interleaved(runs: dict[str, Callable], device: str, repeats: int) -> dict[str, float]:
    """Median milliseconds of every run, one after the other in turn."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(repeats + 1):
        for name, run in runs.items():
            if device == "cuda":
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                run()
                end.record()
                end.synchronize()
                took = start.elapsed_time(end)
            else:
                begin = time.perf_counter()
                run()
                took = 1e3 * (time.perf_counter() - begin)
            if i:  # the first one warms up
                times[name].append(took)
    return {name: statistics.median(values) for name, values in times.items()}


TOY = {
    "mamba_130m": dict(n_layer=1, d_model=16, vocab_size=256),
    "mamba2_130m": dict(n_layer=1, d_model=32, vocab_size=256, ssm_cfg=dict(headdim=8, d_state=4)),
    "moe_mamba_25m": dict(n_blocks=1, d_model=16, n_experts=3, d_expert=8, vocab_size=256),
    "vmamba_tiny": dict(depths=(1, 1), dims=16),
    "spatial_mamba_tiny": dict(depths=(1, 1, 1, 1), embed_dim=16),
    "mambair_light_x2": dict(embed_dim=32, depths=(1,)),
    "sd_ssm": dict(state_size=6),
}


def build(name: str, toy: bool) -> torch.nn.Module:
    torch.manual_seed(0)
    more = dict(TOY[name]) if toy else {}
    if name in ("vmamba_tiny", "spatial_mamba_tiny"):
        more |= dict(num_classes=10)
    return ssmzoo.create_model(name, **more)


def training(name: str, device: str, toy: bool):
    """(model, batch, loss(model, batch), unit, items of a batch) of a training step."""
    F = torch.nn.functional
    model = build(name, toy).to(device).train()
    if name.startswith(("vmamba", "spatial")):
        b, side = (2, 32) if toy else (64, 224)
        batch = dict(x=torch.rand(b, 3, side, side, device=device), y=torch.randint(10, (b,), device=device))
        return model, batch, lambda m, t: F.cross_entropy(m(t["x"]).float(), t["y"]), "images", b
    if name.startswith("mambair"):
        b, side = (1, 8) if toy else (8, 64)
        batch = dict(x=torch.rand(b, 3, side, side, device=device))
        batch["y"] = torch.rand(b, 3, 2 * side, 2 * side, device=device)
        return model, batch, lambda m, t: F.l1_loss(m(t["x"]).float(), t["y"]), "images", b
    b, l = (2, 16) if toy else (64, 512) if name == "sd_ssm" else (8, 2048)
    with torch.no_grad():
        classes = model(torch.zeros(1, 2, dtype=torch.long, device=device)).logits.shape[-1]
    symbols = 2 if name == "sd_ssm" else 200
    ids = torch.randint(symbols, (b, l), device=device)

    def loss(m, t):
        out = m(t["ids"])
        aux = sum((v for k, v in out.aux.items() if k.endswith("_loss")), start=torch.zeros((), device=device))
        return F.cross_entropy(out.logits.float().flatten(0, 1), t["ids"].flatten() % classes) + aux

    return model, dict(ids=ids), loss, "tokens", b * l


def tensors(state) -> list[torch.Tensor]:
    from ssmzoo.inference.captured import tensors

    return tensors(state)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("section", "part", "file", "machine"):
        parser.add_argument(name)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--toy", action="store_true")
    args = parser.parse_args()
    from gpu import rows

    file, run = Path(args.file), time.time()

    def write(**row) -> None:
        row = dict(section=args.section, part=args.part, machine=args.machine, run=run, **row)
        with file.open("a", encoding="utf-8") as out:
            out.write(json.dumps(row) + "\n")

    known = [r for r in rows(file) if r.get("machine") == args.machine]
    getattr(Bench(args.device, args.toy, write, known), args.section)(args.part)


if __name__ == "__main__":
    main()
