"""MambaIR, MambaIRv2 and their exports in spandrel (chaiNNer and ComfyUI load upscalers through it):

>>> import ssmzoo.spandrel
>>> ssmzoo.spandrel.install()
>>> from spandrel import ModelLoader
>>> model = ModelLoader().load_from_file("mambair.pth")      # released, or from `ssmzoo ckpt export RUN --to official`

Every argument is inferred from the tensors.
"""

from __future__ import annotations

from typing import Any

from ssmzoo._torchvision import make_importable

make_importable()  # spandrel imports torchvision

from spandrel import (  # noqa: E402
    MAIN_REGISTRY,
    Architecture,
    ArchSupport,
    ImageModelDescriptor,
    SizeRequirements,
)
from spandrel.util import KeyCondition  # noqa: E402
from torch import Tensor  # noqa: E402

from ssmzoo.released.load import build  # noqa: E402

NAMES = {  # family: what spandrel calls the architecture, and keys that only its files have
    "mambair": ("MambaIR", ("conv_first.weight", "layers.0.residual_group.blocks.0.self_attention.A_logs")),
    "mambair_v2": ("MambaIRv2", ("conv_first.weight", "layers.0.residual_group.layers.0.assm.selectiveScan.A_logs")),
}


class ZooArchitecture(Architecture[Any]):
    """A restoration family of the zoo as an architecture of spandrel."""

    def __init__(self, family: str):
        self.family = family
        name, keys = NAMES[family]
        super().__init__(id=name, name=name, detect=KeyCondition.has_all(*keys))

    def load(self, state_dict: dict[str, Tensor]) -> ImageModelDescriptor:
        """Raises CheckpointError for tensors that do not fit."""
        model, ours = build(self.family, state_dict, {})
        kept = model.state_dict()
        return ImageModelDescriptor(
            model,
            {key: value for key, value in ours.items() if key in kept},
            architecture=self,
            purpose="Restoration" if model.upscale == 1 else "SR",
            tags=[f"{sum(p.numel() for p in model.parameters()):,} parameters"],
            supports_half=False,
            supports_bfloat16=False,
            scale=model.upscale,
            input_channels=model.in_chans,
            output_channels=model.in_chans,
            size_requirements=SizeRequirements(multiple_of=model.size_multiple),
        )


def install() -> list[str]:
    """Add the families to spandrel's registry, once; returns their names there."""
    for family, (name, _) in NAMES.items():
        if name not in MAIN_REGISTRY:
            support = ArchSupport.from_architecture(ZooArchitecture(family), before=("SwinIR",))
            MAIN_REGISTRY.add(support)
    return [name for name, _ in NAMES.values()]
