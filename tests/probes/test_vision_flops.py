"""The counter of operations against the published tables (images of 224 pixels)."""

import pytest
import torch

from ssmzoo.models.vmamba import VMamba
from ssmzoo.presets import build_model, read_model_config
from ssmzoo.probes.flops import count_operations, giga

PUBLISHED = {
    "vmamba_tiny": 4.9,
    "vmamba_small": 8.7,
    "vmamba_base": 15.4,
    "vmamba_tiny_s2l5": 4.9,
    "vmamba_small_s1l20": 8.6,
    "vmamba_base_s1l20": 15.2,
    "vmamba_vanilla_tiny": 5.6,
    "vmamba_vanilla_small": 11.2,
    "vmamba_vanilla_base": 18.0,
    "spatial_mamba_tiny": 4.5,
    "spatial_mamba_small": 7.1,
    "spatial_mamba_base": 15.8,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_operations(name):
    node = {k: v for k, v in read_model_config(name)["model"].items() if not (isinstance(v, str) and "${" in v)}
    with torch.device("meta"):
        model = build_model(node)
    assert giga(count_operations(model, 1, 3, 224, 224)) == pytest.approx(PUBLISHED[name], rel=0.01)


def test_counts_of_a_known_layer_and_no_trace_left():
    model = VMamba(depths=(1,), dims=8, num_classes=2, mlp_ratio=0.0)
    x = torch.randn(1, 3, 8, 8)
    before = model.eval()(x)
    found = count_operations(model, 1, 3, 8, 8)
    assert found["scan"] == 4 * 8 * 4 * (9 + 1)  # four scan directions over 2x2 positions, 8 channels, one state, skip
    torch.testing.assert_close(model(x), before)
