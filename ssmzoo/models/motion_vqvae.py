"""MambaTalk, stage 1: motion of a body part as one code per frame (VQ-VAE), and the plain autoencoder of translation.

    z = encoder(x)                        conv 3 blocks without down-sampling (layers/motion/conv.py)
    k = argmin_k |z - e_k|^2              per frame;  q = z + sg(e_k - z), straight through
    loss = mean |sg(z) - e_k|^2 + lambda mean |z - sg(e_k)|^2
    decoder   2 residual blocks, n times [conv 3, LeakyReLU 0.2], the last of them to the output's width, conv 3

Paper: MambaTalk (NeurIPS 2024, arXiv 2403.09471). Source: project MambaTalk @b3c30e4 (Apache-2.0),
models/motion_representation.py and quantizer.py; parameter names are theirs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ssmzoo.layers.motion.conv import SLOPE, MotionEncoder, ResBlock, conv

CHANNELS = {"face": 106, "upper": 78, "hands": 180, "lower": 61}  # of the parts of a body


class VQOutput(NamedTuple):
    """motion (b l c) rebuilt, latent (b l w) quantised, loss of the codes (scalar), code (b l) int64."""

    motion: Tensor
    latent: Tensor
    loss: Tensor
    code: Tensor


class Quantizer(nn.Module):
    """(b l w) -> latent (b l w), loss, code (b l)."""

    def __init__(self, codes: int, width: int, commitment: float):
        super().__init__()
        self.embedding, self.commitment = nn.Embedding(codes, width), commitment
        nn.init.uniform_(self.embedding.weight, -1 / codes, 1 / codes)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        code = self.nearest(z)
        e = self.embedding(code)
        loss = (z.detach() - e).square().mean() + self.commitment * (z - e.detach()).square().mean()
        return z + (e - z).detach(), loss, code

    def nearest(self, z: Tensor) -> Tensor:
        """Codes (b l) int64 of latents (b l w)."""
        e = self.embedding(torch.arange(self.embedding.num_embeddings, device=z.device))
        distance = z.square().sum(-1, keepdim=True) + e.square().sum(-1) - 2 * z @ e.mT
        return distance.argmin(-1)

    @torch.no_grad()
    def fit(self, z: Tensor, rounds: int = 15) -> None:
        """Codes become the means of k-means over latents z (l w); a mean that no latent is nearest to moves to the
        latents that are furthest from theirs."""
        e = self.embedding.weight
        e.copy_(z[torch.linspace(0, len(z) - 1, len(e), device=z.device).long()])
        for _ in range(rounds):
            code = self.nearest(z)
            off = (z - e[code]).square().sum(-1)
            count = code.bincount(minlength=len(e))
            e.copy_(torch.zeros_like(e).index_add_(0, code, z) / count.clamp(min=1)[:, None])
            empty = (count == 0).nonzero().flatten()[: len(z)]
            e[empty] = z[off.topk(len(empty)).indices]


class MotionDecoder(nn.Module):
    """(b l width) -> (b l c)."""

    def __init__(self, width: int, channels: int, n_layers: int):
        super().__init__()
        blocks: list[nn.Module] = [ResBlock(width), ResBlock(width)]
        for i in range(n_layers):
            blocks += [conv(width, channels if i == n_layers - 1 else width), nn.LeakyReLU(SLOPE)]
        self.main = nn.Sequential(*blocks, conv(channels, channels))

    def forward(self, z: Tensor) -> Tensor:
        return self.main(z.mT).mT


class MotionVQVAE(nn.Module):
    """motion (b l c) -> VQOutput.

    channels, width, n_layers   c, width of the convolutions and codes, layers of encoder and decoder
    codes        size of the code book; 0: no codes, a plain autoencoder (the global motion)
    commitment   lambda
    """

    def __init__(
        self, channels: int = 78, width: int = 256, n_layers: int = 2, codes: int = 256, commitment: float = 1.0
    ):
        super().__init__()
        self.channels = channels
        self.encoder = MotionEncoder(channels, width, n_layers)
        self.quantizer = Quantizer(codes, width, commitment) if codes else None
        self.decoder = MotionDecoder(width, channels, n_layers)

    def forward(self, x: Tensor, quantise: bool = True) -> VQOutput:
        if x.ndim != 3 or x.shape[-1] != self.channels:
            raise ValueError(f"expected motion (batch, frames, {self.channels} channels), got {tuple(x.shape)}")
        z = self.encoder(x)
        code = x.new_zeros(x.shape[:2], dtype=torch.long)
        coded = quantise and self.quantizer is not None
        latent, loss, code = self.quantizer(z) if coded else (z, z.new_zeros(()), code)
        return VQOutput(self.decoder(latent), latent, loss, code)

    @torch.no_grad()
    def start_at(self, x: Tensor) -> None:
        """Before training: the mean of motion x (b l c) goes to zero and comes out of it, latents have unit variance.

        A pose differs little from the mean pose; around zero that little is learnt some five times sooner.
        """
        first, last, mean = self.encoder.main[0], self.decoder.main[-1], x.mean((0, 1))
        first.bias.copy_(-first.weight.sum(-1) @ mean)
        last.bias.copy_(mean)
        spread = self.encoder(x).var((0, 1)).mean().sqrt().clamp(min=1e-6)
        first.weight /= spread
        first.bias /= spread
        last.weight *= spread

    def decode(self, code: Tensor) -> Tensor:
        """Motion (b l c) of codes (b l)."""
        return self.decoder(self.quantizer.embedding(code))


def _standing(lower: Tensor) -> Tensor:
    """(b l 61) without its translation."""
    return torch.cat([lower[..., :54], torch.zeros_like(lower[..., 54:57]), lower[..., 57:]], -1)


class MotionCodes(nn.Module):
    """Stage 1 as a whole: code books of four parts, and the autoencoder of the global motion.

    {"face" (b l 106), "upper" (b l 78), "hands" (b l 180), "lower" (b l 61)} -> {part: VQOutput}, and "global" whose
    motion has the translation (velocity x, height, velocity z) in channels 54 to 57

    width, codes            of all parts
    n_layers, lower_layers  of face, upper body and hands; of the lower body and the global motion

    The translation is read from the lower body as the code book rebuilds it, which is what it is given when it speaks
    (the released code trains it on true motion). quantise=False leaves the code books out.
    """

    def __init__(self, width: int = 256, codes: int = 256, n_layers: int = 2, lower_layers: int = 4):
        super().__init__()
        for part, channels in CHANNELS.items():
            self.add_module(part, MotionVQVAE(channels, width, lower_layers if part == "lower" else n_layers, codes))
        self.add_module("global", MotionVQVAE(CHANNELS["lower"], width, lower_layers, codes=0))
        self.register_buffer("trained", torch.zeros(()))  # steps; stage 2 refuses codes that nobody trained

    def forward(self, parts: dict[str, Tensor], quantise: bool = True) -> dict[str, VQOutput]:
        found = {part: getattr(self, part)(parts[part], quantise) for part in CHANNELS}
        return found | {"global": self.translation(found["lower"].motion.detach())}

    def translation(self, lower: Tensor) -> VQOutput:
        """Of the lower body (b l 61), whose own translation is not looked at."""
        return getattr(self, "global")(_standing(lower))

    def start_at(self, parts: dict[str, Tensor]) -> None:
        """Before training, on many windows of the parts: see `MotionVQVAE.start_at`."""
        for part in CHANNELS:
            getattr(self, part).start_at(parts[part])
        moving = getattr(self, "global")
        moving.start_at(_standing(parts["lower"]))
        moving.decoder.main[-1].bias.data.copy_(parts["lower"].mean((0, 1)))

    def fit_codes(self, parts: dict[str, Tensor]) -> None:
        """Code books of what the encoders make of many windows of the parts."""
        for part in CHANNELS:
            coder = getattr(self, part)
            with torch.no_grad():
                coder.quantizer.fit(coder.encoder(parts[part]).flatten(0, 1))

    def decode(self, codes: dict[str, Tensor]) -> dict[str, Tensor]:
        """Codes (b l) of the four parts -> motion of the four parts, with the translation of the autoencoder."""
        parts = {part: getattr(self, part).decode(code) for part, code in codes.items()}
        lower, moved = parts["lower"], self.translation(parts["lower"]).motion[..., 54:57]
        return parts | {"lower": torch.cat([lower[..., :54], moved, lower[..., 57:]], -1)}
