"""The outer shell that MambaIR and MambaIRv2 share: shallow convolution, deep features, reconstruction head.

    x0 = (x - mean) * img_range                 F0 = conv_first(x0)
    FD = conv_after_body(features(F0)) + F0     y  = head(FD) [+ x0] / img_range + mean

The mean is that of DIV2K for three channels and 0 otherwise; it is no part of the checkpoints. Parameter names are
those of the released weights. Source: MambaIR (arXiv 2402.15648), which follows SwinIR (arXiv 2108.10257).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ssmzoo.ops.imresize import imresize

RGB_MEAN = (0.4488, 0.4371, 0.4040)  # of DIV2K, in [0, 1]
HEADS = ("", "pixelshuffle", "pixelshuffledirect", "nearest+conv")
HEAD_WIDTH = 64  # channels between body and output in the classic heads


def residual_conv(dim: int, kind: str) -> nn.Module:
    """The convolution at the end of a residual group: '1conv' is one 3x3, '3conv' a bottleneck of dim / 4."""
    if kind == "1conv":
        return nn.Conv2d(dim, dim, 3, padding=1)
    if kind == "3conv":
        return nn.Sequential(
            nn.Conv2d(dim, dim // 4, 3, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(dim // 4, dim // 4, 1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(dim // 4, dim, 3, padding=1),
        )
    raise ValueError(f"resi_connection is {kind!r}; expected '1conv' or '3conv'")


def pixel_shuffle_stack(scale: int, width: int) -> nn.Sequential:
    """n times [conv3x3, PixelShuffle 2] for scale 2^n, one [conv3x3, PixelShuffle 3] for scale 3."""
    steps = [3] if scale == 3 else [2] * (scale.bit_length() - 1)
    layers = [m for s in steps for m in (nn.Conv2d(width, s * s * width, 3, padding=1), nn.PixelShuffle(s))]
    return nn.Sequential(*layers)


def check_head(upsampler: str, upscale: int, heads: tuple[str, ...]) -> None:
    """ValueError unless this head exists and can enlarge by `upscale`."""
    if upsampler not in heads:
        raise ValueError(f"upsampler is {upsampler!r}; expected 'auto' or one of {', '.join(map(repr, heads))}")
    if upscale < 1 or int(upscale) != upscale:
        raise ValueError(f"upscale is {upscale}; it must be a positive whole number")
    if upsampler == "" and upscale != 1:
        raise ValueError(
            f"upscale is {upscale} but no upsampler was chosen; use 'pixelshuffle' or "
            f"'pixelshuffledirect', or upscale=1 for denoising and JPEG"
        )
    if upsampler == "pixelshuffle" and upscale != 3 and upscale & (upscale - 1):
        raise ValueError(f"upscale is {upscale}; 'pixelshuffle' enlarges by 3 or by a power of 2")
    if upsampler == "nearest+conv" and upscale != 4:
        raise ValueError(f"upscale is {upscale}; 'nearest+conv' enlarges by 4 only")


class RestorationNet(nn.Module):
    """Images (b c y x) in [0, 1] to images (b c s*y s*x); what the restoration models share around their bodies.

    A subclass defines forward_features(x (b c y x)) -> (b d y x) and forward.


    upscale          s: 1 for denoising and JPEG removal, otherwise 2, 3, 4, 8, ...
    upsampler        '' adds a residual image; 'pixelshuffle' the classic head, 'pixelshuffledirect' the light one,
                     'nearest+conv' for real-world x4; 'auto' is '' for upscale 1 and 'pixelshuffledirect' otherwise
    img_range        1, or 255 to work on the scale of 8-bit levels inside
    resi_connection  '1conv' or '3conv', see `residual_conv`
    bicubic_skip     start as bicubic enlargement (the identity for scale 1) and learn what is missing: the enlarged
                     input is added to the output and the last convolution starts near zero. Not in the papers, where
                     the first few thousand steps go into learning to copy; for runs of minutes
    Raises ValueError for a head and scale that do not go together.
    """

    size_multiple = 1  # height and width may be anything
    window_size = 1  # images are continued by their mirror image to multiples of it, results cut to their size

    def __init__(
        self,
        upscale: int,
        in_chans: int,
        embed_dim: int,
        img_range: float,
        upsampler: str,
        resi_connection: str,
        bicubic_skip: bool = False,
    ):
        super().__init__()
        self.upscale, self.in_chans, self.img_range = upscale, in_chans, img_range
        self.upsampler = ("" if upscale == 1 else "pixelshuffledirect") if upsampler == "auto" else upsampler
        check_head(self.upsampler, upscale, HEADS)
        mean = torch.tensor(RGB_MEAN) if in_chans == 3 else torch.zeros(1)
        self.register_buffer("mean", mean.view(1, -1, 1, 1), persistent=False)
        self.conv_first = nn.Conv2d(in_chans, embed_dim, 3, padding=1)
        self.conv_after_body = residual_conv(embed_dim, resi_connection)
        if self.upsampler == "pixelshuffledirect":
            self.upsample = nn.Sequential(
                nn.Conv2d(embed_dim, in_chans * upscale**2, 3, padding=1), nn.PixelShuffle(upscale)
            )
        elif self.upsampler == "":
            self.conv_last = nn.Conv2d(embed_dim, in_chans, 3, padding=1)
        else:
            self.conv_before_upsample = nn.Sequential(
                nn.Conv2d(embed_dim, HEAD_WIDTH, 3, padding=1), nn.LeakyReLU(0.01)
            )
            self._wide_head(upscale, in_chans)
        self.bicubic_skip, self.grad_checkpointing = bicubic_skip, False
        if bicubic_skip:
            last = self.upsample[0] if self.upsampler == "pixelshuffledirect" else self.conv_last
            nn.init.normal_(last.weight, std=1e-3)
            nn.init.zeros_(last.bias)

    def _wide_head(self, upscale: int, in_chans: int) -> None:
        if self.upsampler == "pixelshuffle":
            self.upsample = pixel_shuffle_stack(upscale, HEAD_WIDTH)
        else:
            for name in ("conv_up1", "conv_up2", "conv_hr"):
                setattr(self, name, nn.Conv2d(HEAD_WIDTH, HEAD_WIDTH, 3, padding=1))
            self.nearest, self.lrelu = nn.Upsample(scale_factor=2, mode="nearest"), nn.LeakyReLU(0.2)
        self.conv_last = nn.Conv2d(HEAD_WIDTH, in_chans, 3, padding=1)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute every residual group in the backward pass instead of keeping its activations."""
        self.grad_checkpointing = enable

    def normalise(self, x: Tensor) -> Tensor:
        """Images (b c y x) in [0, 1] on the scale of the network, continued to multiples of window_size."""
        if x.ndim != 4 or x.shape[1] != self.in_chans:
            raise ValueError(
                f"the input has shape {tuple(x.shape)}; this model takes (batch, {self.in_chans}, height, width)"
            )
        return (mirror_pad(x, self.window_size) - self.mean) * self.img_range

    def reconstruct(self, deep: Tensor, x: Tensor) -> Tensor:
        """Deep features (b d y' x') of images (b c y x) to restored images (b c s*y s*x) in [0, 1]."""
        x0 = self.normalise(x)  # (b c y' x')
        y = self.upsampled(deep) if self.upsampler else x0 + self.conv_last(deep)
        if self.bicubic_skip and self.upsampler:
            y = y + imresize(x0, float(self.upscale))
        return (y / self.img_range + self.mean)[:, :, : x.shape[2] * self.upscale, : x.shape[3] * self.upscale]

    def upsampled(self, deep: Tensor) -> Tensor:
        """The reconstruction head: deep features (b d y x) to an image (b c s*y s*x)"""
        if self.upsampler == "pixelshuffledirect":
            return self.upsample(deep)
        wide = self.conv_before_upsample(deep)
        if self.upsampler == "pixelshuffle":
            return self.conv_last(self.upsample(wide))
        wide = self.lrelu(self.conv_up1(self.nearest(wide)))
        wide = self.lrelu(self.conv_up2(self.nearest(wide)))
        return self.conv_last(self.lrelu(self.conv_hr(wide)))


def mirror_pad(x: Tensor, multiple: int) -> Tensor:
    """Extend (b c y x) at the bottom and right to multiples by the mirror image, edge row included."""
    for dim in (2, 3):
        n = x.shape[dim]
        if n % multiple:
            at = torch.arange(n + -n % multiple, device=x.device) % (2 * n)
            x = x.index_select(dim, torch.minimum(at, 2 * n - 1 - at))
    return x


def init_restoration(module: nn.Module) -> None:
    """The papers' rule, for `Module.apply`: Linear normal with std 0.02 and zero bias, LayerNorm 1 and 0."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)
