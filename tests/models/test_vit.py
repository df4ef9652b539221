"""The transformer twin of the plain encoders equals timm's DeiT-Tiny with the same weights, and has its size."""

import torch

from ssmzoo._torchvision import make_importable
from ssmzoo.models.vit import ViT

make_importable()


def test_it_is_timms_deit():
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    theirs = VisionTransformer(img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=3, num_classes=7).eval()
    ours = ViT(img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=3, num_classes=7).eval()
    names = {"blocks.": "layers.", "norm.": "norm_f."}
    state = {}
    for name, value in theirs.state_dict().items():
        old = next((o for o in names if name.startswith(o)), "")
        state[name.replace(old, names.get(old, ""), 1) if old else name] = value
    ours.load_state_dict(state)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    assert torch.allclose(ours.double()(x), theirs.double()(x), atol=1e-10)
    with torch.device("meta"):
        assert sum(p.numel() for p in ViT().parameters()) == 5_717_416  # DeiT-Ti


def test_a_head_that_does_not_divide_the_width_is_named():
    import pytest

    with pytest.raises(ValueError, match="embed_dim=50 has no 3 heads"):
        ViT(embed_dim=50)
