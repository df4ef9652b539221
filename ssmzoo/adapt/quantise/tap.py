"""Looking at activations while a float model runs over the calibration text."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssmzoo.layers.hadamard import HadamardLinear, hadamard


class Taps:
    """Hooks on modules that are taken off again. Hooked layers run in parts, so that every point is passed."""

    def __init__(self):
        self.handles, self.convolutions = [], []

    def __enter__(self) -> Taps:
        return self

    def __exit__(self, *_) -> None:
        for handle in self.handles:
            handle.remove()
        for conv in self.convolutions:
            del conv.activate

    def inputs(self, module: nn.Module, see: Callable[[Tensor], None]) -> None:
        """What the weight of a linear layer meets: rotated inputs where it rotates them."""
        turns = isinstance(module, HadamardLinear)
        self.handles.append(
            module.register_forward_pre_hook(lambda m, args: see(hadamard(args[0]) if turns else args[0]))
        )

    def outputs(self, module: nn.Module, see: Callable[[Tensor], None]) -> None:
        """What a module returns; of linear layers without the bias, which integers get afterwards."""
        bias = getattr(module, "bias", None) if isinstance(module, nn.Linear) else None
        self.handles.append(module.register_forward_hook(lambda m, args, y: see(y if bias is None else y - bias)))

    def behind_conv(self, conv: nn.Conv1d, see: Callable[[Tensor], None]) -> None:
        """SiLU of the convolution, (b l c)."""

        def activate(y: Tensor) -> Tensor:
            y = F.silu(y)
            see(y.transpose(1, 2))
            return y

        conv.activate = activate
        self.convolutions.append(conv)
        self.handles.append(conv.register_forward_hook(lambda m, args, y: None))  # `short_conv` calls it then


@torch.no_grad()
def run(model: nn.Module, samples: Sequence[Tensor]) -> None:
    """Show a model in eval mode the samples, (l) token ids or a batch of what it takes, one by one."""
    for sample in samples:
        model(sample[None] if sample.ndim == 1 else sample)
