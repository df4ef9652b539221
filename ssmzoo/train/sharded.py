"""Fully sharded data parallelism: every rank holds 1/W of each parameter, gradient and optimiser state.

Lightning's ModelParallelStrategy carries it and PyTorch's `fully_shard` (FSDP2) does it. What is ours is where to cut,
and checkpoints: they hold whole tensors, the same as those of one process, so either continues the other's run.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy, ParallelStrategy
from torch import Tensor, nn

from ssmzoo.layers.feedforward.moe import Experts


def units(model: nn.Module) -> list[nn.Module]:
    """Modules that are gathered one at a time, inner ones first: banks of experts, and the entries of module lists."""
    experts = [m for m in model.modules() if isinstance(m, Experts)]
    entries = [m for part in model.modules() if isinstance(part, nn.ModuleList) for m in part]
    entries = [m for m in entries if type(m).forward is not nn.Module.forward and any(True for _ in m.parameters())]
    inside = {id(inner) for m in entries for inner in m.modules() if inner is not m}
    return experts + [m for m in entries if id(m) not in inside and m not in experts]


def whole(value: Any) -> Any:
    """A sharded tensor put together on every rank and moved to the CPU; anything else as it is."""
    return value.full_tensor().cpu() if hasattr(value, "full_tensor") else value


def _like(value: Any, parameter: Tensor) -> Any:
    """A whole tensor of a parameter's shape cut like the parameter."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if isinstance(parameter, DTensor) and isinstance(value, Tensor) and value.shape == parameter.shape:
        return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
    return value


class Sharded(ModelParallelStrategy):
    """`trainer.strategy=fsdp`. Tasks call `shard` from `configure_model`."""

    lightning_restore_optimizer = True  # by load_optimizer_state_dict below

    def __init__(self) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes  # Lightning asks for it before both are known
        super().setup_environment()

    def shard(self, model: nn.Module) -> None:
        from torch.distributed.fsdp import fully_shard

        mesh = self.device_mesh["data_parallel"]
        for module in units(model):
            fully_shard(module, mesh=mesh)
        fully_shard(model, mesh=mesh)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return {k: whole(v) for k, v in self.lightning_module.state_dict().items()}

    def optimizer_state(self, optimizer) -> dict[str, Any]:
        found = getattr(optimizer, "optimizer", optimizer).state_dict()
        states = {i: {k: whole(v) for k, v in state.items()} for i, state in found["state"].items()}
        return found | {"state": states}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath, storage_options=None) -> None:
        ParallelStrategy.save_checkpoint(self, checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path, weights_only: bool | None = None) -> dict[str, Any]:
        return ParallelStrategy.load_checkpoint(self, checkpoint_path, weights_only=weights_only)

    @torch.no_grad()
    def load_model_state_dict(self, checkpoint, strict: bool = True) -> None:
        own = self.lightning_module.state_dict()
        state = {k: _like(v, own[k]) if k in own else v for k, v in checkpoint["state_dict"].items()}
        self.lightning_module.load_state_dict(state, strict=strict)

    def load_optimizer_state_dict(self, checkpoint) -> None:
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"]):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            numbers = [i for group in saved["param_groups"] for i in group["params"]]
            states = {
                i: {k: _like(v, p) for k, v in saved["state"].get(i, {}).items()} for i, p in zip(numbers, parameters)
            }
            optimizer.load_state_dict(saved | {"state": states})
