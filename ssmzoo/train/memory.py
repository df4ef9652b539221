"""How much memory a training step needs, without running it at its size.

Parameters, gradients, optimiser states and averaged weights are counted. What the step holds besides (activations kept
for the backward pass, temporaries, the data) is found by tracing two steps: every tensor that an operation returns is
followed until it is freed, and the largest sum is the peak. The tensors are fake ones (shapes without memory) where the
model allows that; otherwise two small batches are run for real and the peak is continued in a straight line.
"""

from __future__ import annotations

import os
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode  # no public name; torch.export is built on them
from torch.utils._python_dispatch import TorchDispatchMode  # no public name; PyTorch's own FLOP counter uses it

HOLES = 0.45  # of the step, on a CPU: what glibc's heap holds beyond the tensors (measured: 0.27 to 0.67)


class Memory(NamedTuple):
    """Bytes of one process. `step` is the peak of what comes and goes within a step, gradients left out."""

    parameters: int
    gradients: int
    optimizer: int
    ema: int
    step: int
    unit: int  # parameters of the largest unit that FSDP gathers
    traced: str  # "fake" or "small batches"

    def on_one(self) -> int:
        return self.parameters + self.gradients + self.optimizer + self.ema + self.step

    def resident(self) -> int:
        """On a CPU, with the holes between blocks of the heap; none with MALLOC_MMAP_THRESHOLD_=131072, but slower."""
        return self.on_one() + (0 if "MALLOC_MMAP_THRESHOLD_" in os.environ else round(HOLES * self.step))

    def ddp(self) -> int:
        """Per GPU: DDP keeps a second copy of the gradients, its buckets."""
        return self.on_one() + self.gradients

    def fsdp(self, gpus: int) -> int:
        """Per GPU: shards, and two units gathered at a time (one computes, the next is on its way)."""
        shards = self.parameters + self.gradients + self.optimizer + self.ema
        return -(-shards // gpus) + (2 * self.unit if gpus > 1 else 0) + self.step


def _guess_number(tensor: Tensor):
    return {torch.bool: True}.get(tensor.dtype, 1.0 if tensor.is_floating_point() else 0)


def _guess_index(tensor: Tensor, indices):
    """A choice by a mask takes everything: the most that it can be."""
    mask = indices[0]
    if len(indices) != 1 or mask is None or mask.dtype != torch.bool:
        return NotImplemented
    return tensor.new_empty([mask.numel(), *tensor.shape[mask.ndim :]])


GUESSES = {  # what depends on values, which fake tensors do not have
    "aten::_local_scalar_dense": _guess_number,  # Tensor.item
    "aten::index.Tensor": _guess_index,
}


class Peak(TorchDispatchMode):
    """Bytes of the tensors alive that operations have made since it was entered, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if isinstance(args[0] if args else None, FakeTensor) and func.name() in GUESSES:
            out = GUESSES[func.name()](*args)
            if out is NotImplemented:
                out = func(*args, **(kwargs or {}))
        else:
            out = func(*args, **(kwargs or {}))
        for tensor in tensors_in(out):
            self.follow(tensor)
        return out

    def follow(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)  # of one object as long as the memory lives
        if key in self._known:
            return
        size = storage.nbytes()
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def tensors_in(value: Any) -> list[Tensor]:
    """Tensors in what an operation returns: one, or lists of some."""
    if isinstance(value, (list, tuple)):
        return [tensor for part in value for tensor in tensors_in(part)]
    return [value] if isinstance(value, Tensor) else []


def size_of(tensors) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def trace_step(task, batch: dict[str, Any], precision: str = "32-true", real: bool = False) -> tuple[int, int, int]:
    """(parameters and buffers, optimiser states, peak of a step beyond these and the gradients) in bytes.

    real  the tensors have memory: PyTorch's allocator is watched, which also sees what operators allocate inside
    """
    model = task.model
    optimizer = task.optim(model)["optimizer"]
    fixed = size_of(model.parameters()) + size_of(model.buffers())
    half = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)

    def step() -> None:
        kept = {k: v.clone() if isinstance(v, Tensor) else v for k, v in batch.items()}
        with torch.autocast("cpu", dtype=half, enabled=half is not None):
            out = task.step(kept, training=True)
            loss = out.loss if out.auxiliary is None else out.loss + out.auxiliary
        optimizer.zero_grad()  # in Lightning's order: the last gradients live through the forward pass
        loss.backward()
        optimizer.step()

    def made() -> tuple[int, int]:
        states = size_of(t for s in optimizer.state.values() for t in s.values() if isinstance(t, Tensor))
        return states, size_of(p.grad for p in model.parameters() if p.grad is not None)

    task.train()
    if real:
        step()  # makes gradients and optimiser states; the second step is like all others
        return fixed, made()[0], _allocated(step)
    tracker = Peak()
    with tracker:
        step()
        tracker.peak = tracker.live
        states, gradients = made()
        step()
    return fixed, states, tracker.peak - states - gradients


def _allocated(step) -> int:
    """The most that PyTorch's allocator gave out at a time during `step()`, over what was out before."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def of_run(overrides: list[str]) -> tuple[Memory, int, str]:
    """(memory, samples per process, samples' shapes) of what `python train.py <overrides>` would train on a CPU."""
    import functools

    from hydra import compose, initialize_config_dir

    from ssmzoo.presets import build_model, config_dir
    from ssmzoo.train import config as configuration
    from ssmzoo.train import optim
    from ssmzoo.train.build import build_data
    from ssmzoo.train.recomputation import set_recomputation

    configuration.register_resolvers()
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        cfg = compose("train", configuration.free_overrides(overrides))
    data, plain = build_data(cfg)

    def task():
        factory = functools.partial(optim.build, total_steps=1000, **plain["optim"])
        model = build_model(plain["model"])
        if plain.get("grad_checkpointing"):
            set_recomputation(model, plain["grad_checkpointing"])
        return configuration.build_node(plain["task"], "ssmzoo.tasks.", model=model, optim=factory)

    found = longest(next(iter(data.train_dataloader())), getattr(data, "max_length", 0))
    size = len(next(iter(found.values())))
    shapes = ", ".join(f"{k} {tuple(v.shape[1:])}" for k, v in found.items() if isinstance(v, Tensor))
    memory = predict(
        task,
        lambda n: {k: v[:n] for k, v in found.items()},
        size,
        precision=plain["trainer"]["precision"],
        ema=bool(plain["callbacks"].get("ema")),
    )
    return memory, size, shapes


def longest(batch: dict[str, Any], length: int) -> dict[str, Any]:
    """A batch (b l) of strings that may grow in training, repeated to the length they grow to."""
    if not length:
        return batch
    return {
        k: v.repeat(1, -(-length // v.shape[1]))[:, :length] if isinstance(v, Tensor) and v.ndim == 2 else v
        for k, v in batch.items()
    }


def predict(cfg_task, batch, batch_size: int, *, precision: str = "32-true", ema: bool = False) -> Memory:
    """Memory of training with `batch_size` samples per process.

    cfg_task()      builds the task anew;  batch(n)  a batch of n samples
    """
    try:
        data = batch(batch_size)
        with torch.device("meta"):
            task = cfg_task()
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            _materialise(task)
            fake = {k: mode.from_tensor(v) if isinstance(v, Tensor) else v for k, v in data.items()}
            fixed, states, step = trace_step(task, fake, precision)
            how = "fake"
    except Exception:  # a shape or a decision that depends on values
        small, large = max(1, batch_size // 4), max(1, batch_size // 2)
        task = cfg_task()
        fixed, states, step = trace_step(task, batch(small), precision, real=True)
        if large > small:
            more = trace_step(cfg_task(), batch(large), precision, real=True)[2]
            step = round(step + (more - step) * (batch_size - small) / (large - small))
        how = "small batches"
    trained = size_of(p for p in task.model.parameters() if p.requires_grad)
    return Memory(fixed, trained, states, fixed if ema else 0, step, _largest_unit(task.model), how)


def _materialise(task) -> None:
    """Tensors instead of meta tensors; what was a tied parameter stays tied."""
    owners: dict[int, list] = {}
    for module in task.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            owners.setdefault(id(parameter), []).append((module, name))
    task.to_empty(device="cpu")
    for (module, name), *others in owners.values():
        for other, its_name in others:
            setattr(other, its_name, getattr(module, name))


def _largest_unit(model: nn.Module) -> int:
    from ssmzoo.train.sharded import units

    found = units(model)
    inside = {id(p) for m in found for p in m.parameters()}
    rest = size_of(p for p in model.parameters() if id(p) not in inside)
    return max([rest, *(size_of(m.parameters()) for m in found)])
