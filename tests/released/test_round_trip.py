"""Official names -> ours -> official names gives every tensor back, bit for bit, for every case and family."""

import pytest
import torch
from paths import GOLDEN

from ssmzoo.released.family import find, to_official
from ssmzoo.released.fit import fit_state_dict
from ssmzoo.released.golden import GoldenCase
from ssmzoo.released.load import build
from ssmzoo.released.maat import UNUSED

CASES = sorted(GOLDEN.glob("*/*.json"))
CASES = [f for f in CASES if find(f.parent.name, "official") and GoldenCase.load(f).params]
OURS = ("gated_ssm_bidirectional", "gated_ssm_paper")  # of birdie: equations with weights of our names, no class
CASES = [f for f in CASES if f.stem not in OURS]


def test_there_are_cases_of_every_kind():
    assert len(CASES) > 60
    assert {"mamba", "mamba_hf", "vmamba", "vim", "mambair", "moe_mamba", "dsf"} <= {f.parent.name for f in CASES}


@pytest.mark.parametrize("file", CASES, ids=[f"{f.parent.name}/{f.stem}" for f in CASES])
def test_official_names_come_back_bit_for_bit(file):
    case = GoldenCase.load(file)
    official = {key: value.detach() for key, value in case.params.items()}
    module, ours = build(case.family, official, case.official_kwargs)
    fit_state_dict(module, ours)
    back = to_official(case.family, module, **case.official_kwargs)
    assert back.keys() == official.keys()
    for key, expected in official.items():
        if case.family == "maat" and UNUSED in key:
            continue  # norms that nothing calls: they go out as the official class makes them
        got = torch.view_as_real(back[key]) if back[key].is_complex() else back[key]  # cases store pairs
        assert got.dtype == expected.dtype and torch.equal(got, expected), key


def test_vmamba_files_of_the_one_file_code_load():
    case = GoldenCase.load(GOLDEN / "vmamba" / "classifier_v05_noz.json")
    state = {key: value.detach() for key, value in case.params.items()}
    grouped = {
        key.replace("x_proj_weight", "x_proj.weight").replace("dt_projs_weight", "dt_projs.weight"): (
            value.flatten(0, 1) if key.endswith(("x_proj_weight", "dt_projs_weight")) else value
        )
        for key, value in state.items()
    }
    assert grouped.keys() != state.keys()
    expected, got = (find("vmamba", "official")(dict(s), **case.official_kwargs)[1] for s in (state, grouped))
    assert expected.keys() == got.keys() and all(torch.equal(got[key], expected[key]) for key in expected)
