"""Plain image encoder of MambaVision mixers whose first block sorts the tokens by learned importance.

    X = patches + positions;   X <- X + DropPath(Mixer(RMSNorm(X)));   logits = W mean of RMSNorm(X) over the patches

The mixer and the sorting are in layers/image/mamba_vision.py. The paper puts the reordering into the first mixer of
every stage of MambaVision-T; here the encoder is one stage without attention and without windows, so that the effect of
the reordering stands alone.
Source: Vo et al. 2025 (arXiv 2410.03292).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn as nn

from ssmzoo.layers.image.mamba_vision import MambaVisionMixer
from ssmzoo.layers.init import scaled_output_
from ssmzoo.models.vim import Vim


class ReorderedMamba(Vim):
    """Image classifier. (b c y x) -> (b num_classes).

    reorder      sort tokens in the first block | tau: temperature of the sorting; small is close to a permutation
    d_conv, expand   of the mixers; the other arguments as in `Vim`
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        img_size: int | Sequence[int] = 224,
        patch_size: int = 16,
        embed_dim: int = 192,
        depth: int = 24,
        d_state: int = 8,
        d_conv: int = 3,
        expand: float = 1,
        reorder: bool = True,
        tau: float = 1.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
    ):
        super().__init__(
            in_chans,
            num_classes,
            global_pool,
            img_size,
            patch_size,
            None,
            embed_dim,
            depth,
            d_state,
            class_token="none",
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
        )
        for i, layer in enumerate(self.layers):
            layer.mixer = MambaVisionMixer(embed_dim, d_state, d_conv, expand, reorder=reorder and i == 0, tau=tau)
            scaled_output_(layer.mixer.out_proj.weight, depth)
            nn.init.trunc_normal_(layer.mixer.in_proj.weight, std=0.02)
