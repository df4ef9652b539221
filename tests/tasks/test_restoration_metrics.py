"""Metrics, resampling, degradations and losses against known answers."""

import math

import pytest
import torch

from ssmzoo.data.degradation import benchmark_noise, jpeg, to_uint8
from ssmzoo.ops.imresize import imresize, mod_crop
from ssmzoo.tasks.metrics.image import luma, psnr, rgb_to_ycbcr, ssim, ycbcr_to_rgb
from ssmzoo.tasks.objectives.pixel import charbonnier, l1


def test_psnr_of_a_constant_error_of_one_level_is_48_13_db():
    image = torch.randint(0, 255, (3, 20, 20))
    assert psnr(image, image + 1) == pytest.approx(20 * math.log10(255))
    assert psnr(image, image) == math.inf


def test_psnr_sees_only_what_the_border_leaves():
    image = torch.randint(0, 250, (3, 20, 24))
    other = image.clone()
    other[:, :2] += 5
    other[:, :, -2:] += 5
    assert psnr(image, other, crop=2) == math.inf
    assert psnr(image, other, crop=1) < math.inf


def test_white_is_235_and_black_16_on_the_studio_swing_and_grey_passes_unchanged():
    white, black = torch.full((3, 2, 2), 255), torch.zeros(3, 2, 2)
    assert luma(white)[0, 0, 0].item() == pytest.approx(235) and luma(black)[0, 0, 0].item() == pytest.approx(16)
    grey = torch.randint(0, 256, (1, 4, 4))
    assert torch.equal(luma(grey), grey)


def test_ycbcr_there_and_back_is_within_two_levels():
    image = torch.randint(0, 256, (3, 16, 16))
    assert (ycbcr_to_rgb(rgb_to_ycbcr(image).round()) - image).abs().max() <= 2


def test_ssim_is_one_for_equal_images_and_small_for_unrelated_ones():
    a, b = torch.randint(0, 256, (2, 3, 32, 32))
    assert ssim(a, a) == pytest.approx(1.0) and ssim(a, b) < 0.1


def test_metrics_refuse_what_cannot_be_measured():
    a = torch.zeros(3, 8, 8)
    with pytest.raises(ValueError, match="differ in shape"):
        psnr(a, a[:, 1:])
    with pytest.raises(ValueError, match="leaves nothing"):
        psnr(a, a, crop=4)
    with pytest.raises(ValueError, match="11 x 11"):
        ssim(a, a)


def test_imresize_keeps_constants_and_sizes_are_rounded_up():
    image = torch.full((3, 11, 7), 0.3)
    for scale in (0.5, 1 / 3, 0.25, 2.0, 3.0):
        out = imresize(image, scale)
        assert out.shape == (3, math.ceil(11 * scale), math.ceil(7 * scale))
        torch.testing.assert_close(out, torch.full_like(out, 0.3))


def test_imresize_is_linear_and_symmetric_under_flips():
    image = torch.rand(1, 12, 18, dtype=torch.float64)
    torch.testing.assert_close(imresize(image.flip(-1), 0.5), imresize(image, 0.5).flip(-1))
    torch.testing.assert_close(imresize(image.mT, 1 / 3), imresize(image, 1 / 3).mT)


def test_imresize_refuses_levels_and_odd_scales():
    with pytest.raises(ValueError, match="floating-point"):
        imresize(torch.zeros(3, 4, 4, dtype=torch.uint8), 0.5)
    with pytest.raises(ValueError, match="positive"):
        imresize(torch.zeros(3, 4, 4), 0)


def test_mod_crop_cuts_at_the_bottom_and_right():
    image = torch.arange(35.0).view(1, 5, 7)
    assert torch.equal(mod_crop(image, 3), image[:, :3, :6])


def test_rounding_is_half_to_even_and_clamped():
    values = torch.tensor([-0.1, 0.5 / 255, 1.5 / 255, 2.0], dtype=torch.float64)
    assert to_uint8(values).tolist() == [0, 0, 2, 255]


def test_benchmark_noise_is_the_same_for_every_picture_and_not_clipped():
    white = torch.ones(3, 16, 16)
    noise = benchmark_noise(white, 50) - white
    torch.testing.assert_close(noise, benchmark_noise(white * 0, 50))
    near = 3 / (2 * noise.numel()) ** 0.5  # three standard errors of a deviation
    assert noise.std().item() == pytest.approx(50 / 255, rel=near) and benchmark_noise(white, 50).max() > 1


def test_jpeg_quality_orders_the_error_and_is_checked():
    image = torch.rand(3, 32, 32)
    errors = [(jpeg(image, q) - image).abs().mean().item() for q in (10, 50, 95)]
    assert errors == sorted(errors, reverse=True)
    with pytest.raises(ValueError, match="between 1 and 100"):
        jpeg(image, 0)


def test_losses_at_known_values():
    a, b = torch.zeros(2, 3), torch.full((2, 3), 0.5)
    assert l1(a, b).item() == 0.5
    assert charbonnier(a, b).item() == pytest.approx(math.sqrt(0.25 + 1e-3))
    assert charbonnier(a, a).item() == pytest.approx(math.sqrt(1e-3))
