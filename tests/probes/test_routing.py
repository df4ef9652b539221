"""The routing probe against a mixture whose answers are known."""

import pytest
import torch

from ssmzoo.models.mamba import MambaLM
from ssmzoo.models.moe_mamba import MoEMambaLM
from ssmzoo.probes.routing import KINDS, answers, choices, contingency, information, kind_of, probe
from ssmzoo.probes.subject import Subject

TEXTS = ["a", "B", "7", " ", "\n", "+", "é", "z"]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return MoEMambaLM(8, 16, 2, 3, d_state=4, top_k=2).eval()


@pytest.mark.parametrize("arrangement, mixtures", [("interleaved", 2), ("parallel", 2), ("inner", 6)])
def test_logits_and_norms_are_those_of_the_layers(arrangement, mixtures):
    torch.manual_seed(0)
    model = MoEMambaLM(8, 16, 2, 3, d_expert=8, arrangement=arrangement, d_state=4).train()
    ids, seen = torch.randint(8, (2, 5)), {}
    for name, m in model.named_modules():
        if hasattr(m, "gating"):
            m.register_forward_pre_hook(lambda m, args, name=name: seen.update({name: args[0].detach().flatten(0, 1)}))
    found = choices(model, ids)
    assert [c.name for c in found] == list(seen) and len(found) == mixtures and model.training
    for c in found:
        moe = model.get_submodule(c.name)
        torch.testing.assert_close(c.logits, seen[c.name] @ moe.gating.gate)
        bank = moe.expert_inner_function
        for e in range(3):
            y = torch.relu(seen[c.name] @ bank.lin1_weight[e]) @ bank.lin2_weight[e]
            torch.testing.assert_close(c.norms[:, e], y.norm(dim=-1))
        assert c.share.sum() == pytest.approx(1) and 0 <= c.strongest <= 1 and -1 <= c.correlation <= 1


def test_a_router_that_follows_the_norms_is_found_out(model):
    ids = torch.randint(8, (4, 16))
    with torch.no_grad():
        for m in model.modules():
            if hasattr(m, "gating"):  # expert 1 answers louder than the others and is always chosen
                m.expert_inner_function.lin2_weight[1] *= 100
    found = choices(model, ids)
    assert all(torch.equal(c.norms.argmax(-1), torch.ones(64, dtype=torch.long)) for c in found)
    assert all(c.strongest == pytest.approx(float(c.share[1])) for c in found)


def test_information_is_one_for_specialists_and_none_for_chance():
    kind = torch.arange(len(KINDS)).repeat(20)
    assert information(contingency(kind, kind, len(KINDS))) == pytest.approx(1)
    assert information(torch.outer(torch.arange(1, 8), torch.arange(1, 4))) == pytest.approx(0, abs=1e-12)
    half = contingency(torch.arange(4).repeat(5), torch.arange(4).repeat(5) // 2, 2)
    assert information(half) == pytest.approx(0.5)
    assert information(contingency(torch.zeros(5, dtype=torch.long), torch.arange(5) % 2, 2)) == 0


def test_kinds_of_tokens():
    assert [kind_of(text) for text in TEXTS] == [
        "letter",
        "capital",
        "digit",
        "space",
        "line end",
        "mark",
        "letter",
        "letter",
    ]
    assert kind_of("") == "other" and kind_of(" Word") == "capital" and kind_of(" = 3") == "mark"


def test_the_probe_writes_tables_and_a_picture(model, tmp_path):
    finding = probe(Subject(model, torch.arange(8)[None], classes=TEXTS, vocab_size=8))
    files = {f.name for f in finding.write(tmp_path, "routing")}
    assert {"summary.md", "experts.csv", "kinds.csv", "routing.png"} == files
    columns, rows = finding.tables["experts"]
    assert len(rows) == 6 and sum(float(row[2]) for row in rows) == pytest.approx(2, abs=1e-3)


def test_models_without_experts_and_pictures_are_refused():
    with pytest.raises(ValueError, match="MambaLM has none; it is for models such as"):
        choices(MambaLM(8, 16, 1), torch.zeros(1, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="language models with experts"):
        probe(Subject(MambaLM(8, 16, 1), torch.zeros(1, 3, 4, 4)))


def test_answers_of_every_expert(model):
    moe = next(m for m in model.modules() if hasattr(m, "gating"))
    assert answers(moe, torch.randn(5, 16)).shape == (5, 3)
