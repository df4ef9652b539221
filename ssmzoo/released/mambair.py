"""MambaIR as released by MambaIR@33d7b34 (Apache-2.0): MambaIR, MambaIRUNet, VSSBlock, SS2D."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ssmzoo.layers.image.ss2d import SS2D
from ssmzoo.models.mambair import RSSB, MambaIR
from ssmzoo.models.mambair_unet import MambaIRUNet
from ssmzoo.released.arguments import DEVICE, RECOMPUTE, Arguments
from ssmzoo.released.catalogue import Hub, Weights, on_drive
from ssmzoo.released.image import with_bias
from ssmzoo.released.infer import count, part, ratio
from ssmzoo.released.vmamba import SCAN_INITIAL

MODELS = (MambaIR, MambaIRUNet)
TELLING_KEYS = r"layers\.\d+\.residual_group|encoder_level1\.\d"
YIELDS_TO = ("mambair_v2",)
WRAPPERS = ("params", "params_ema", "state_dict", "model")  # what the published test reads first
OLD = "a key of old option files, which the released class swallows"
WITHOUT = {
    **{"img_size": (64, "only counts operations"), "patch_size": (1, "unread"), "use_checkpoint": RECOMPUTE},
    **{"norm_layer": ("ln", "a LayerNorm under either name"), "type": (None, "the option file's name of the class")},
    **{"window_size": (None, OLD), "num_heads": (None, OLD), "interval": (None, OLD)},
}
MODEL = Arguments(
    "MambaIR",
    {
        **{"in_chans": 3, "embed_dim": 96, "depths": (6, 6, 6, 6), "drop_rate": 0.0, "d_state": 16, "mlp_ratio": 2.0},
        **{"drop_path_rate": 0.1, "patch_norm": True, "upscale": 2, "img_range": 1.0, "upsampler": ""},
        "resi_connection": "1conv",
    },
    WITHOUT,
)
UNET = Arguments(
    "MambaIRUNet",
    {
        **{"inp_channels": 3, "out_channels": 3, "dim": 48, "num_blocks": (4, 6, 6, 8), "num_refinement_blocks": 4},
        **{"mlp_ratio": 2.0, "bias": False, "drop_path_rate": 0.0},
    },
    {"type": WITHOUT["type"]},
    {"dual_pixel_task": (False, "cannot run in the released code (a 2-D convolution meets tokens)")},
)
SCAN = {"d_state": 16, "d_conv": 3, "expand": 2.0, "dt_rank": "auto", "conv_bias": True, "bias": False}
BLOCK = Arguments(
    "VSSBlock",
    {"hidden_dim": 0, "drop_path": 0.0, "attn_drop_rate": 0.0, "is_light_sr": False, "norm_eps": 1e-6} | SCAN,
    SCAN_INITIAL | {"norm_layer": WITHOUT["norm_layer"]},
)
MIXER = Arguments("SS2D", {"dropout": 0.0} | SCAN, SCAN_INITIAL | DEVICE, required=("d_model",))
TABLES = (MODEL, UNET, BLOCK, MIXER)


def official(state: dict[str, Tensor], **given):
    """MambaIR, MambaIRUNet, VSSBlock or SS2D by the released names; which one is read off the checkpoint's keys."""
    if "x_proj_weight" in state:
        return official_ss2d(**MIXER.complete(given)), state
    if "self_attention.x_proj_weight" in state:
        return official_block(state, **BLOCK.complete(given)), state
    squeeze = squeeze_of(state)
    if "patch_embed.proj.weight" in state:  # the state sizes of a U-Net, which differ between releases, are inferred
        return MambaIRUNet(**UNET.complete(given), d_state=states_of_levels(state), squeeze_factor=squeeze), state
    config = MODEL.complete(given)
    if "conv_up1.weight" in state:
        raise ValueError("the file has a head that enlarges by neighbours (conv_up1), which the released MambaIR lacks")
    if config["upsampler"] not in ("pixelshuffle", "pixelshuffledirect"):
        config |= {"upsampler": "", "upscale": 1}
    return MambaIR(**config, squeeze_factor=squeeze), state


def states_of_levels(state: dict[str, Tensor]) -> tuple[int, ...]:
    """State sizes of the four levels; a level without blocks has the released one."""
    levels = ("encoder_level1", "encoder_level2", "encoder_level3", "latent")
    found = (state.get(f"{level}.0.self_attention.A_logs") for level in levels)
    return tuple(16 if A is None else A.shape[1] for A in found)


def official_block(state, hidden_dim, drop_path, attn_drop_rate, is_light_sr, norm_eps, **scan) -> RSSB:
    """One released `VSSBlock` as a module (tokens (b l d), (rows, columns)) -> tokens."""
    block = TokenBlock(hidden_dim, scan["d_state"], scan["expand"], drop_path, is_light_sr, squeeze_of(state))
    block.self_attention = official_ss2d(hidden_dim, dropout=attn_drop_rate, **scan)
    block.ln_1.eps = norm_eps  # of norm_layer there, which makes the first norm only; 1e-5 in the whole models
    return block


class TokenBlock(RSSB):
    """RSSB with the released calling convention: tokens (b l d) and their (rows, columns)."""

    def forward(self, x: Tensor, x_size) -> Tensor:
        return super().forward(x.unflatten(1, tuple(int(s) for s in x_size))).flatten(1, 2)


def official_ss2d(d_model, d_state, d_conv, expand, dt_rank, dropout, conv_bias, bias) -> SS2D:
    """The released `SS2D` mixer, (b y x d) to the same."""
    mixer = SS2D(d_model, d_state, expand, dt_rank, d_conv, conv_bias, dropout=dropout)
    if bias:
        mixer.in_proj, mixer.out_proj = with_bias(mixer.in_proj), with_bias(mixer.out_proj)
    return mixer


def infer(state: dict[str, Tensor], given: Mapping[str, Any]) -> dict[str, Any]:
    """All that has weights; img_range has none."""
    if "x_proj_weight" in state:
        return {"d_model": len(state["out_proj.weight"])} | infer_mixer(state)
    if "self_attention.x_proj_weight" in state:
        light = "conv_blk.cab.1.weight" in state and state["conv_blk.cab.0.weight"].shape[-1] == 1
        inferred = {"hidden_dim": len(state["ln_1.weight"]), "is_light_sr": light}
        return inferred | infer_mixer(part(state, "self_attention."))
    if "patch_embed.proj.weight" in state:
        return infer_unet(state)
    return infer_restoration(state, "blocks.0.self_attention.")


def infer_unet(state: dict[str, Tensor]) -> dict[str, Any]:
    dim, channels = state["patch_embed.proj.weight"].shape[:2]
    levels = ("encoder_level1", "encoder_level2", "encoder_level3", "latent")
    inferred = {"dim": dim, "inp_channels": channels, "out_channels": len(state["output.weight"])}
    inferred |= {"num_blocks": [count(state, f"{level}.#.") for level in levels], "bias": "output.bias" in state}
    inferred["num_refinement_blocks"] = count(state, "refinement.#.")
    first = next((key for key in state if key.endswith("self_attention.out_proj.weight")), None)
    if first is not None:
        d, e = state[first].shape
        inferred["mlp_ratio"] = ratio(e, d)
    return inferred


def infer_restoration(state: dict[str, Tensor], mixer: str) -> dict[str, Any]:
    """Sizes and head of MambaIR and MambaIRv2."""
    if "conv_first.weight" not in state:
        return {}
    d, channels = state["conv_first.weight"].shape[:2]
    at = "blocks" if mixer.startswith("blocks") else "layers"
    depths = [count(state, f"layers.{i}.residual_group.{at}.#.") for i in range(count(state, "layers.#."))]
    inferred = {
        "embed_dim": d,
        "in_chans": channels,
        "depths": depths,
        "patch_norm": "patch_embed.norm.weight" in state,
    }
    inferred["resi_connection"] = "1conv" if "conv_after_body.weight" in state else "3conv"
    if at == "blocks":
        scan = infer_mixer(part(state, f"layers.0.residual_group.{mixer}"))
        inferred |= {"d_state": scan["d_state"], "mlp_ratio": scan["expand"]}
    return inferred | head_of(state, channels)


def head_of(state: dict[str, Tensor], channels: int) -> dict[str, Any]:
    """upsampler and upscale, by the layers of the head."""
    if "conv_up1.weight" in state:
        return {"upsampler": "nearest+conv", "upscale": 4}
    if "conv_before_upsample.0.weight" in state:
        steps = [value for key, value in state.items() if key.startswith("upsample.") and value.ndim == 4]
        nine = len(steps) == 1 and len(steps[0]) == 9 * steps[0].shape[1]
        return {"upsampler": "pixelshuffle", "upscale": 3 if nine else 2 ** len(steps)}
    if "upsample.0.weight" in state:
        return {
            "upsampler": "pixelshuffledirect",
            "upscale": round((len(state["upsample.0.weight"]) / channels) ** 0.5),
        }
    return {}


def infer_mixer(state: dict[str, Tensor]) -> dict[str, Any]:
    d, e = state["out_proj.weight"].shape
    return {
        **{"d_state": state["A_logs"].shape[1], "d_conv": state["conv2d.weight"].shape[-1], "expand": ratio(e, d)},
        **{"dt_rank": state["dt_projs_weight"].shape[-1], "conv_bias": "conv2d.bias" in state},
        "bias": "in_proj.bias" in state,
    }


def squeeze_of(state: dict[str, Tensor]) -> int:
    """The channel attention's squeeze factor that a checkpoint was built with (30 when that fits)."""
    shapes = {v.shape[:2] for k, v in state.items() if k.endswith("attention.1.weight")}  # {(units, channels)}
    factors = [f for f in (30, *range(1, 512)) if all(c // f == u for u, c in shapes)]
    if not factors:
        raise ValueError("the channel-attention widths of this checkpoint follow no common squeeze factor")
    return factors[0]


CLASSIC = "11Kiy_0hmMyDjMvW7MmbUT6tO9n5JrDeB 1u0VcESEduHu-GBCC6vDGQt9qXSX2AKdn 1YXggWIsi-auCjmPQDvW9FjB1f9fZK0hN"
LIGHT = "1eWovtH7YvEn2Bm9wBK5REOhbIgapsLxM 1JoC3fwah5Xo0Z1s8DnmXQlsctKQjs1Hx 1jIz579k_16569HFVF-76KgqAbJaJoDgF"
NOISE = "1w5Y502iKSkqhP-OpleppPmk6PAnvWPdr 1qSPy6B7Jvi7PDHM1fl8Q88kn7ckwtusK 1O2o9xPruX8MtUL4qmuxV4Vfsef8L_jLM"
JPEG = "1kncutEIAq9MvD8w6If6VZD7hkRkRcXWr 1hIIJQR59XmizMapxLOWtihhF3R7prYu3 1XbuIsLuCtwV78cVMYLuWXm-hNQDsbn6M"
DRIVE = (  # preset, tags, ids on Google Drive, published PSNR (dB) and SSIM
    *zip(
        *(("mambair_classic_x2", "mambair_classic_x3", "mambair_classic_x4"), ("", "", ""), CLASSIC.split()),
        ("Urban100 34.15 / 0.9446", "Urban100 29.93 / 0.8841", "Urban100 27.68 / 0.8287"),
    ),
    *zip(
        *(("mambair_light_x2", "mambair_light_x3", "mambair_light_x4"), ("", "", ""), LIGHT.split()),
        ("Urban100 32.92 / 0.9356", "Urban100 29.00 / 0.8689", "Urban100 26.75 / 0.8051"),
    ),
    *zip(
        *(3 * ("mambair_denoise",), ("sigma15", "sigma25", "sigma50"), NOISE.split()),
        ("Urban100 35.17", "Urban100 32.99", "Urban100 30.07"),
    ),
    *zip(
        *(3 * ("mambair_jpeg",), ("q10", "q30", "q40"), JPEG.split()),
        ("Classic5 30.27 / 0.8256", "Classic5 33.74 / 0.8965", "Classic5 34.53 / 0.9084"),
    ),
    ("mambair_unet", "", "1iMcapgaT7VPfR2UFYy21KbX3rUHFJCU8", "SIDD 39.89 / 0.960"),
)
SEEN = {  # those that the hub is known to hold as well
    "1YXggWIsi-auCjmPQDvW9FjB1f9fZK0hN": Hub("cguoh/MambaIR", "MambaIRv1_ckpt/MambaIR_classicSRx4.pth"),
    "1qSPy6B7Jvi7PDHM1fl8Q88kn7ckwtusK": Hub("cguoh/MambaIR", "MambaIRv1_ckpt/ColorDN_MambaIR_level25.pth"),
}
CATALOGUE = tuple(
    Weights(preset, SEEN.get(key) or on_drive(key), tag, licence="apache-2.0", metric=f"PSNR (/ SSIM) {metric}")
    for preset, tag, key, metric in DRIVE
)
