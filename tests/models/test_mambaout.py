"""MambaOut's maps are timm's with the same weights; its size but for the head."""

import re

import pytest
import torch

from ssmzoo._torchvision import make_importable
from ssmzoo.models.mambaout import GatedConv, MambaOut

make_importable()
NAMES = (  # timm's -> ours
    (r"^stem\.conv1", "patch_embed.proj"),
    (r"^stem\.", "patch_embed."),
    (r"^stages\.(\d)\.blocks\.(\d)\.(fc1|conv|fc2)", r"layers.\1.blocks.\2.op.\3"),
    (r"^stages\.1\.downsample", "layers.0.downsample"),
    (r"^stages\.", "layers."),
)


def test_its_maps_are_timms():
    from timm.models.mambaout import MambaOut as Timms

    torch.manual_seed(0)
    theirs = Timms(depths=(1, 2), dims=(24, 40), conv_ratio=0.5, num_classes=5, downsample="conv").double().eval()
    ours = MambaOut(depths=(1, 2), dims=(24, 40), conv_ratio=0.5, num_classes=5).double().eval()
    state = {}
    for name, value in theirs.state_dict().items():
        for pattern, new in NAMES:
            name, changed = re.subn(pattern, new, name)
            if changed:
                break
        state[name] = value
    missing, unexpected = ours.load_state_dict(state, strict=False)
    assert set(missing) == {"norm.weight", "norm.bias", "head.weight", "head.bias"}
    assert all(name.startswith("head.") for name in unexpected)
    for module in (*ours.modules(), *theirs.modules()):
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 1e-6
    x = torch.randn(2, 3, 36, 44, dtype=torch.float64)
    assert torch.allclose(ours.forward_stages(x)[-1], theirs.forward_features(x), atol=1e-10)


def test_sizes():
    with torch.device("meta"):
        body = sum(p.numel() for name, p in MambaOut().named_parameters() if not name.startswith("head"))
    assert body == 22_904_928 + 2 * 576  # timm's mambaout_tiny less its head, and our final norm
    with pytest.raises(ValueError, match="its side is odd"):
        GatedConv(8, 2.0, 4, 1.0)
