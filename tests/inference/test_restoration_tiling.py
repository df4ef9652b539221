"""Tiles: the published scheme, blending without seams, padding, self-ensemble, pictures of any depth."""

import pytest
import torch
import torch.nn.functional as F

from ssmzoo.inference.restore import enlarge_alpha, restore_levels
from ssmzoo.inference.tiling import (
    axis_fades,
    published_tiles,
    reflect_pad,
    run_blended,
    run_padded,
    run_published,
    self_ensemble,
    tile_starts,
)
from ssmzoo.models.mambair import MambaIR


class Local(torch.nn.Module):
    """A 5 x 5 blur followed by nearest enlargement: its result near a pixel depends on 2 pixels around it."""

    in_chans, size_multiple = 3, 1

    def __init__(self, scale=2):
        super().__init__()
        self.upscale, self.weight = scale, torch.nn.Parameter(torch.rand(3, 1, 5, 5) / 25)

    def forward(self, x):
        return F.interpolate(F.conv2d(x, self.weight, padding=2, groups=3), scale_factor=self.upscale)


@pytest.mark.parametrize(
    "length, tile, overlap", [(10, 16, 4), (16, 16, 4), (17, 16, 4), (100, 16, 5), (33, 16, 0), (5, 3, 1)]
)
def test_tiles_cover_and_weights_sum_to_one(length, tile, overlap):
    starts = tile_starts(length, tile, overlap)
    total = torch.zeros(length)
    for start, weight in zip(starts, axis_fades(starts, length, tile, overlap)):
        total[start : start + len(weight)] += weight
    torch.testing.assert_close(total, torch.ones(length))
    assert all(a + tile - b >= overlap for a, b in zip(starts, starts[1:]))


@pytest.mark.parametrize("size", [(1, 1), (20, 31), (64, 40), (37, 90)])
def test_blended_tiles_of_a_local_model_equal_the_whole_picture(size):
    """Overlap 8: two pixels next to a tile's edge are left out, as far as this model sees the padding; 4 cross-fade."""
    model, x = Local(), torch.rand(3, *size)
    with torch.no_grad():
        tiled = torch.cat(list(run_blended(model, x, 2, tile=24, overlap=8)), dim=1)
        torch.testing.assert_close(tiled, model(x[None])[0])


def test_published_tiles_of_a_pointwise_model_equal_the_whole_picture():
    def double(x):
        return F.interpolate(x * 2, scale_factor=3)

    x = torch.rand(1, 3, 43, 58)
    torch.testing.assert_close(run_published(double, x, 3, side=20), double(x))
    assert len(published_tiles(199, 199)[1]) == 1 and len(published_tiles(200, 400)[1]) == 2 * 3


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (8, 9), (16, 16)])
def test_padding_to_a_multiple_is_cut_off_again(size):
    x = torch.rand(1, 3, *size)
    torch.testing.assert_close(run_padded(lambda v: v, x, 1, 8), x)
    if min(size) > 8:
        torch.testing.assert_close(reflect_pad(x, 20, 20), F.pad(x, (0, 4, 0, 4), mode="reflect"))


def test_self_ensemble_undoes_every_transform():
    x = torch.rand(2, 3, 5, 7)
    y = self_ensemble(lambda v: F.interpolate(v, scale_factor=2), x)
    torch.testing.assert_close(y, F.interpolate(x, scale_factor=2))
    weight = torch.rand(3, 1, 3, 3)
    y = self_ensemble(lambda v: F.conv2d(v, weight, padding=1, groups=3), x)
    mean = sum(w.rot90(k, (-2, -1)) for k in range(4) for w in (weight, weight.flip(-1))) / 8
    torch.testing.assert_close(y, F.conv2d(x, mean, padding=1, groups=3))


def test_overlap_must_fit_the_tile():
    with pytest.raises(ValueError, match="at most 5"):
        list(run_blended(Local(), torch.rand(3, 40, 40), 2, tile=16, overlap=12))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("top, dtype", [(255, torch.uint8), (65535, torch.uint16)])
def test_restoring_levels_equals_the_model_on_floats(channels, top, dtype):
    model = MambaIR(2, embed_dim=30, depths=(1,), d_state=2, mlp_ratio=1.0).eval()
    levels = torch.randint(0, top + 1, (channels, 9, 11)).to(dtype)
    out = restore_levels(model, levels, top)
    with torch.no_grad():
        expected = model(levels[None].float().expand(-1, 3, -1, -1) / top)[0]
    expected = expected.mean(0, keepdim=True) if channels == 1 else expected
    assert out.dtype == dtype and out.shape == (channels, 18, 22)
    torch.testing.assert_close(out.float() / top, expected.clamp(0, 1), atol=0.51 / top + 1e-6, rtol=0)


def test_a_colour_picture_is_refused_by_a_grey_model():
    model = MambaIR(1, in_chans=1, embed_dim=30, depths=(1,), d_state=2, mlp_ratio=1.0)
    with pytest.raises(ValueError, match="3 colour channels"):
        restore_levels(model, torch.zeros(3, 8, 8, dtype=torch.uint8), 255)


def test_alpha_in_strips_equals_alpha_at_once():
    from ssmzoo.ops.imresize import imresize

    alpha = torch.randint(0, 256, (1100, 6), dtype=torch.uint8)
    whole = (imresize(alpha.float() / 255, 2.0).clamp(0, 1) * 255).round().to(torch.uint8)
    assert (enlarge_alpha(alpha, 255, 2).int() - whole.int()).abs().max() <= 1
    assert torch.equal(enlarge_alpha(alpha, 255, 1), alpha)
