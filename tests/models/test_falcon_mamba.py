"""Falcon-Mamba's mixer is Mamba's with normed scan inputs, whole and token by token."""

import torch

import ssmzoo
from ssmzoo.layers.mixers.mamba import Mamba
from ssmzoo.models.falcon_mamba import FalconMambaLM, FalconMambaMixer, NormedProjection


def test_the_projection_divides_every_part_by_its_root_mean_square():
    torch.manual_seed(0)
    projection, x = NormedProjection(6, (2, 3, 3), 1e-6), torch.randn(4, 6)
    for part, plain in zip(projection(x).split((2, 3, 3), -1), (x @ projection.weight.T).split((2, 3, 3), -1)):
        assert torch.allclose(part, plain / (plain.square().mean(-1, keepdim=True) + 1e-6).sqrt())


def test_only_the_scan_inputs_differ_from_mamba():
    torch.manual_seed(0)
    falcon, mamba, x = FalconMambaMixer(16), Mamba(16), torch.randn(2, 7, 16)
    mamba.load_state_dict(falcon.state_dict())
    assert not torch.allclose(falcon(x)[0], mamba(x)[0])
    mamba.x_proj = falcon.x_proj
    assert torch.allclose(falcon(x)[0], mamba(x)[0])


def test_published_size():
    with torch.device("meta"):
        model = FalconMambaLM(65024, 4096, 64, tie_embeddings=False)
    assert sum(p.numel() for p in model.parameters()) == 7_272_665_088
    assert "falcon_mamba_7b" in ssmzoo.list_models()
