"""Res-VMamba: vanilla VMamba with a residual path around every stage, for fine-grained food pictures.

    T_{i+1} = Down_i(Blocks_i(T_i)) + R_i(T_i)         R_i = conv1x1_i o maxpool2            stages 0, 1, 2

The released code draws the three 1x1 convolutions anew in every forward pass, so they are neither trained nor stored
and its answers are random. Here `fuse` chooses: "learned" is the design that the paper describes; "random" draws new
projections per pass, as released; "none" is plain VMamba, which also loads a released checkpoint.
The pool rounds odd sides up as the patch merging beside it does (the released one rounds down, where the sum fails).

b batch, y x rows and columns, d width of the stage.
Source: Chen et al. 2024 (arXiv 2402.15761; PLoS ONE 20(5) e0322695); the public project ResVMamba carries no licence
and is written anew here.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from ssmzoo.deprecated import into, old_arguments
from ssmzoo.models.vmamba import VMamba, without_patch_norm

VANILLA = {"gate": "act", "conv_bias": True}


@old_arguments(mlp_act=into("mlp", "act"), patch_norm=without_patch_norm)
class ResVMamba(VMamba):
    """Image classifier and feature pyramid. (b c y x) -> (b num_classes); the defaults are the paper's (VMamba-S).

    fuse    "learned", "random" or "none", see above
    Other arguments as in `VMamba`.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        patch_size: int = 4,
        depths: Sequence[int] = (2, 2, 27, 2),
        dims: int | Sequence[int] = 96,
        d_state: int = 16,
        ssm_ratio: float = 2.0,
        mixer: dict | None = None,
        mlp_ratio: float = 0.0,
        mlp: dict | None = None,
        stem: str = "patch",
        downsample: str = "merge",
        fuse: str = "learned",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.3,
    ):
        if fuse not in ("learned", "random", "none"):
            raise ValueError(f"fuse is {fuse!r}; expected 'learned', 'random' or 'none'")
        super().__init__(
            in_chans,
            num_classes,
            global_pool,
            patch_size=patch_size,
            depths=depths,
            dims=dims,
            d_state=d_state,
            ssm_ratio=ssm_ratio,
            mixer=VANILLA | dict(mixer or {}),
            mlp_ratio=mlp_ratio,
            mlp=mlp,
            stem=stem,
            downsample=downsample,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
        )
        self.fusion = fuse
        self.fuse = (
            nn.ModuleList(nn.Conv2d(d, d_next, 1) for d, d_next in zip(self.dims, self.dims[1:]))
            if fuse == "learned"
            else None
        )

    def forward_stages(self, x: Tensor, stop: int | None = None) -> list[Tensor]:
        """As in `VMamba`, with the residual path around every stage."""
        x = entering = self.patch_embed(x)  # (b y/4 x/4 d)
        maps = []
        for i, stage in enumerate(itertools.islice(self.layers, stop)):
            if i:
                x = self.layers[i - 1].downsample(x)  # (b y x d) -> (b y/2 x/2 2d)
                x = x if self.fusion == "none" else x + self.residual(i - 1, entering)
            entering, x = x, stage(x)
            maps.append(x)
        return maps

    def residual(self, i: int, x: Tensor) -> Tensor:
        """R_i: (b y x d) -> (b y/2 x/2 2d)"""
        x = F.max_pool2d(x.permute(0, 3, 1, 2), 2, ceil_mode=True)
        if self.fusion == "learned":
            return self.fuse[i](x).permute(0, 2, 3, 1)
        d, d_next = self.dims[i : i + 2]
        weight = x.new_empty(d_next, d, 1, 1).uniform_(-(d**-0.5), d**-0.5)  # a new nn.Conv2d's
        return F.conv2d(x, weight, x.new_empty(d_next).uniform_(-(d**-0.5), d**-0.5)).permute(0, 2, 3, 1)

    def prune_intermediate_layers(self, indices=1, prune_norm: bool = False, prune_head: bool = True) -> list[int]:
        taken = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        self.fuse = self.fuse[: len(self.layers) - 1] if self.fuse is not None else None
        return taken

    def group_matcher(self, coarse: bool = False) -> dict:
        groups = super().group_matcher(coarse)
        return groups if coarse else groups | {"blocks": [(r"^fuse\.(\d+)", (99,)), *groups["blocks"]]}
