"""Local attribution: a convolution is attributed to its own surroundings, and pictures are asked for."""

import pytest
import torch
from torch import nn

from ssmzoo.models.edsr import EDSR
from ssmzoo.probes.local_attribution import blurred, gini, local_attribution, probe
from ssmzoo.probes.subject import Subject


def test_a_convolution_reaches_as_far_as_it_does():
    torch.manual_seed(0)
    near = local_attribution(nn.Conv2d(3, 3, 3, padding=1), images := torch.rand(2, 3, 40, 40), steps=4)
    rows, columns = (near.map > 0).nonzero().unbind(1)
    assert rows.min() >= 15 and rows.max() <= 24 and columns.min() >= 15 and columns.max() <= 24  # 8 + 1 on each side
    wide = local_attribution(nn.Conv2d(3, 3, 21, padding=10), images, steps=4)
    assert wide.diffusion > 2 * near.diffusion and wide.shares[95] > near.shares[95]
    enlarged = local_attribution(EDSR(embed_dim=8, depth=1, upscale=2).eval(), images, steps=2)
    assert enlarged.map.shape == (40, 40) and 0 < enlarged.diffusion < 100


def test_pieces():
    assert gini(torch.ones(50)) == pytest.approx(0) and gini(torch.eye(1, 50)) == pytest.approx(0.98)
    flat = torch.full((1, 3, 9, 9), 0.3)
    assert torch.allclose(blurred(flat, 1.2), flat) and blurred(flat, 0.0) is flat
    plain = local_attribution(nn.Conv2d(3, 3, 3, padding=1), torch.full((1, 3, 32, 32), 0.3), steps=2)
    assert plain.map.isfinite().all() and plain.diffusion == plain.diffusion  # nothing to attribute
    assert "diffusion index" in probe(Subject(nn.Conv2d(3, 3, 3, padding=1), torch.rand(1, 3, 32, 32))).summary


def test_what_is_no_restoration_is_refused():
    with pytest.raises(ValueError, match="16 pixels a side"):
        local_attribution(nn.Identity(), torch.rand(1, 3, 8, 8))
    with pytest.raises(ValueError, match="Flatten returns no restored pictures"):
        local_attribution(nn.Flatten(), torch.rand(1, 3, 16, 16))
