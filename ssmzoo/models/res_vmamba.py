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

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from ssmzoo.models.vmamba import (
    VMamba,
    VSSBlock,
    act_name,
    official_mixer,
    official_norm,
    official_stages,
    rename_official,
)

VANILLA = {"gate": "act", "conv_bias": True}


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
        mlp_act: str = "gelu",
        patch_norm: bool = True,
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
            mlp_act=mlp_act,
            patch_norm=patch_norm,
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

    def descend(self, i: int, entering: Tensor, tap: Tensor) -> Tensor:
        x = super().descend(i, entering, tap)
        return x if self.fusion == "none" else x + self.residual(i, entering)

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


# ---- released checkpoints ------------------------------------------------------------------------------------------


def official_arguments(
    patch_size: int = 4,
    in_chans: int = 3,
    num_classes: int = 1000,
    depths=(2, 2, 9, 2),
    dims=(96, 192, 384, 768),
    d_state: int = 16,
    dt_rank="auto",
    ssm_ratio: float = 2.0,
    attn_drop_rate: float = 0.0,
    shared_ssm: bool = False,
    softmax_version: bool = False,
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.1,
    mlp_ratio: float = 0.0,
    patch_norm: bool = True,
    norm_layer="ln",
    downsample_version: str = "v1",
    use_checkpoint: bool = False,
) -> dict:
    """Arguments of `ResVMamba` for the released VSSM's."""
    if softmax_version:
        raise ValueError("softmax_version=True raises in the released forward pass; there is nothing to reproduce")
    return dict(
        patch_size=patch_size,
        in_chans=in_chans,
        num_classes=num_classes,
        depths=depths,
        dims=dims,
        d_state=d_state,
        ssm_ratio=ssm_ratio,
        mixer={"dt_rank": dt_rank, "dropout": attn_drop_rate},
        mlp_ratio=mlp_ratio,
        patch_norm=patch_norm,
        drop_rate=drop_rate,
        downsample={"v1": "merge", "v2": "conv2"}[downsample_version],
        drop_path_rate=drop_path_rate,
    )


def official_res_vmamba(state: dict[str, Tensor], **official_kwargs):
    """VSSM or VSSBlock of the released project. Without `fuse` keys, as in its checkpoints, no residual path."""
    state = rename_official(state)
    if "op.x_proj_weight" in state:
        return official_block(**official_kwargs), state
    fuse = "learned" if any(key.startswith("fuse.") for key in state) else "none"
    return official_stages(
        ResVMamba, lambda **kwargs: official_arguments(**kwargs) | {"fuse": fuse}, state, official_kwargs
    )


def official_block(
    hidden_dim: int,
    drop_path: float = 0.0,
    norm_layer="ln",
    attn_drop_rate: float = 0.0,
    d_state: int = 16,
    dt_rank="auto",
    ssm_ratio: float = 2.0,
    shared_ssm: bool = False,
    softmax_version: bool = False,
    use_checkpoint: bool = False,
    mlp_ratio: float = 4.0,
    act_layer="gelu",
    drop: float = 0.0,
    norm_eps: float = 1e-5,
) -> VSSBlock:
    """norm_eps is that of the released whole models."""
    from ssmzoo.layers.image.ss2d import SS2D

    options = official_mixer("v0", d_state, ssm_ratio, dt_rank, dropout=attn_drop_rate)
    block = VSSBlock(
        hidden_dim,
        SS2D(hidden_dim, **options),
        mlp_ratio,
        act_name(act_layer),
        norm=official_norm(norm_layer),
        drop_path=drop_path,
        mlp_drop=drop,
    )
    for norm in (block.norm, getattr(block, "norm2", None)):
        if norm is not None:
            norm.eps = norm_eps
    return block
