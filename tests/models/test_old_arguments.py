"""Constructor arguments of the last release still build the same models, with a warning."""

import pytest
import torch

import ssmzoo
from ssmzoo.layers.image.ss2d import SS2D
from ssmzoo.models.mambair_v2 import MambaIRv2
from ssmzoo.models.token_dynamics import choose_scenario
from ssmzoo.models.vim import Vim
from ssmzoo.models.vmamba import VMamba, VSSBlock
from ssmzoo.presets import build_model

SMALL = dict(depths=(1, 1), dims=8)
V2 = dict(embed_dim=12, depths=(1,), num_heads=2, window_size=4, inner_rank=3, num_tokens=4, d_state=2)
VIM = dict(depth=2, embed_dim=8, d_state=2, img_size=32)
PAIRS = [
    (VMamba, SMALL | dict(mlp_act="relu"), SMALL | dict(mlp={"act": "relu"})),
    (VMamba, SMALL | dict(gmlp=True, mlp_drop_rate=0.5), SMALL | dict(mlp={"gated": True, "drop": 0.5})),
    (VMamba, SMALL | dict(patch_norm=False), SMALL | dict(stem="conv_no_norm")),
    (VMamba, SMALL | dict(patch_norm=False, stem="patch"), SMALL | dict(stem="patch_no_norm")),
    (VMamba, SMALL | dict(patch_norm=True), SMALL),
    (VMamba, SMALL | dict(pos_embed=True, img_size=64), SMALL | dict(pos_embed=64)),
    (VMamba, SMALL | dict(img_size=64), SMALL),
    (VMamba, SMALL | dict(mixer={"out_act": "gelu"}), SMALL | dict(mixer={"out_norm": "layer+gelu"})),
    (MambaIRv2, V2 | dict(qkv_bias=False, ape=8), V2 | dict(swin={"qkv_bias": False, "ape": 8})),
    (MambaIRv2, V2 | dict(patch_norm=False), V2 | dict(swin={"patch_norm": False})),
    (SS2D, dict(d_model=8, out_act="gelu", out_norm="conv"), dict(d_model=8, out_norm="conv+gelu")),
    (Vim, VIM | dict(rope="branch", rope_reference=7), VIM | dict(rope="branch", rope_options={"reference": 7})),
    (
        Vim,
        VIM | dict(rope="stream", rope_from_second=True),
        VIM | dict(rope="stream", rope_options={"from_second": True}),
    ),
]


@pytest.mark.parametrize("cls, old, new", PAIRS)
def test_old_arguments_build_the_same(cls, old, new):
    torch.manual_seed(0)
    with pytest.warns(DeprecationWarning, match="will be refused by the next release"):
        one = cls(**old)
    torch.manual_seed(0)
    other = cls(**new)
    assert str(one) == str(other)
    for (name, a), (key, b) in zip(one.state_dict().items(), other.state_dict().items(), strict=True):
        assert name == key and torch.equal(a, b)


def test_a_block_and_the_zoo_take_them_too():
    with pytest.warns(DeprecationWarning, match=r"write mlp=\{'act': 'relu'\}"):
        assert VSSBlock(8, torch.nn.Identity(), mlp_act="relu").mlp.act == "relu"
    with pytest.warns(DeprecationWarning, match="mlp_act"):
        ssmzoo.create_model("vmamba", mlp_act="relu")
    with pytest.raises(TypeError, match="no argument 'mlp_acts'; nearest: mlp"):
        build_model({"_target_": "ssmzoo.models.vmamba.VMamba", "mlp_acts": "relu"})


@pytest.mark.parametrize("arrangement", ["interleaved", "inner"])
def test_a_scenario_of_moe_mamba_is_chosen_behind_the_constructor(arrangement):
    small = dict(vocab_size=16, d_model=8, n_blocks=2, n_experts=2, arrangement=arrangement)
    node = {"_target_": "ssmzoo.models.moe_mamba.MoEMambaLM", **small}
    torch.manual_seed(0)
    with pytest.warns(DeprecationWarning, match=r"write choose_scenario\(model, 'mixed'\) behind it"):
        old = build_model(node | {"scenario": "mixed"})
    torch.manual_seed(0)
    new = build_model(node)
    assert choose_scenario(new, "mixed") == 2
    assert old.state_dict().keys() == new.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(old.state_dict().values(), new.state_dict().values()))
    with pytest.warns(DeprecationWarning, match="nothing: it is the default"):
        assert not [k for k in build_model(node | {"scenario": None}).state_dict() if "parametrizations" in k]
