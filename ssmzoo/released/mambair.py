"""MambaIR as released by MambaIR@33d7b34 (Apache-2.0): MambaIR, MambaIRUNet, VSSBlock and SS2D."""

from __future__ import annotations

from torch import Tensor, nn

from ssmzoo.layers.image.ss2d import SS2D
from ssmzoo.models.mambair import RSSB, MambaIR
from ssmzoo.models.mambair_unet import MambaIRUNet

MODELS = (MambaIR, MambaIRUNet)
TELLING_KEYS = r"layers\.\d+\.residual_group"
YIELDS_TO = ("mambair_v2",)
BOOKKEEPING = ("img_size", "patch_size", "use_checkpoint", "norm_layer")  # no influence on the result
LEGACY = ("type", "window_size", "num_heads", "interval")  # keys of old option files, ignored by the released class too
INIT_ONLY = ("dt_min", "dt_max", "dt_init", "dt_scale", "dt_init_floor")  # official arguments a checkpoint overrides


def official(state: dict[str, Tensor], **official_kwargs):
    """MambaIR, MambaIRUNet, VSSBlock or SS2D by the released names; which one is read off the checkpoint's keys.

    The arguments are those of the official class. Those that only size bookkeeping or set initial values are accepted
    and have no influence on a loaded model; so are the keys of old option files that the released class ignores.
    """
    kwargs = dict(official_kwargs)
    if "x_proj_weight" in state:
        return official_ss2d(**{k: v for k, v in kwargs.items() if k not in INIT_ONLY}), state
    if "patch_embed.proj.weight" in state:
        return build_official_unet(state, squeeze_factor=squeeze_of(state), **kwargs), state
    kwargs = {k: v for k, v in kwargs.items() if k not in BOOKKEEPING + LEGACY}
    if "self_attention.x_proj_weight" in state:
        return official_block(state, **kwargs), state
    defaults = {"embed_dim": 96, "depths": (6, 6, 6, 6), "upscale": 2, "upsampler": ""}
    kwargs = defaults | kwargs
    if kwargs["upsampler"] not in ("pixelshuffle", "pixelshuffledirect"):
        kwargs |= {"upsampler": "", "upscale": 1}
    return MambaIR(**kwargs, squeeze_factor=squeeze_of(state)), state


def build_official_unet(
    state: dict[str, Tensor],
    squeeze_factor: int,
    dual_pixel_task: bool = False,
    mlp_ratio: float = 2.0,
    **official_kwargs,
) -> MambaIRUNet:
    """A released MambaIRUNet; the state sizes, which differ between releases, are read off the checkpoint."""
    if dual_pixel_task:
        raise ValueError(
            "dual_pixel_task=True cannot run in the released code (a 2-D convolution meets tokens), "
            "so no checkpoint needs it"
        )
    levels = ("encoder_level1", "encoder_level2", "encoder_level3", "latent")
    sizes = tuple(state[f"{level}.0.self_attention.A_logs"].shape[1] for level in levels)
    return MambaIRUNet(mlp_ratio=mlp_ratio, d_state=sizes, squeeze_factor=squeeze_factor, **official_kwargs)


def official_block(
    state: dict[str, Tensor],
    hidden_dim: int,
    d_state: int = 16,
    expand: float = 2.0,
    drop_path: float = 0.0,
    attn_drop_rate: float = 0.0,
    is_light_sr: bool = False,
):
    """One released `VSSBlock` as a module (tokens (b l d), (rows, columns)) -> tokens."""
    block = TokenBlock(hidden_dim, d_state, expand, drop_path, is_light_sr, squeeze_of(state))
    block.self_attention.dropout.p = attn_drop_rate
    return block


class TokenBlock(RSSB):
    """RSSB with the released calling convention: tokens (b l d) and their (rows, columns)."""

    def forward(self, x: Tensor, x_size) -> Tensor:
        return super().forward(x.unflatten(1, tuple(int(s) for s in x_size))).flatten(1, 2)


def official_ss2d(
    d_model: int,
    d_state: int = 16,
    d_conv: int = 3,
    expand: float = 2.0,
    dt_rank: int | str = "auto",
    dropout: float = 0.0,
    conv_bias: bool = True,
    bias: bool = False,
) -> SS2D:
    """The released `SS2D` mixer, (b y x d) to the same."""
    mixer = SS2D(d_model, d_state, expand, dt_rank, d_conv, conv_bias, dropout=dropout)
    if bias:
        for name in ("in_proj", "out_proj"):
            old = getattr(mixer, name)
            setattr(mixer, name, nn.Linear(old.in_features, old.out_features))
    return mixer


def squeeze_of(state: dict[str, Tensor]) -> int:
    """The channel attention's squeeze factor that a checkpoint was built with (30 when that fits)."""
    shapes = {v.shape[:2] for k, v in state.items() if k.endswith("attention.1.weight")}  # {(units, channels)}
    factors = [f for f in (30, *range(1, 512)) if all(c // f == u for u, c in shapes)]
    if not factors:
        raise ValueError("the channel-attention widths of this checkpoint follow no common squeeze factor")
    return factors[0]
