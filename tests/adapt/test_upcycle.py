"""Upcycling: copies compute what the dense model did, a drawn share of units is new, runs start from dense ones."""

import pytest
import torch

from ssmzoo.adapt.upcycle import upcycle, upcycled_state
from ssmzoo.layers.feedforward.moe import MoE
from ssmzoo.models.baselines import TransformerLM
from ssmzoo.models.cheems import CheemsLM
from ssmzoo.models.mamba import MambaLM
from ssmzoo.models.moe_mamba import MoEMambaLM
from ssmzoo.train.init_from import start_from

DENSE = {
    "ReLU": lambda: TransformerLM(17, 16, 2, 2),
    "gated MLP": lambda: MambaLM(17, 16, 2, d_intermediate=128),
    "SwiGLU": lambda: CheemsLM(17, 16, 2, 2, 12, "SA"),
}
IDS = torch.randint(17, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("kind", DENSE)
def test_copies_compute_what_the_dense_model_did(kind):
    dense = DENSE[kind]().eval()
    before = {key: value.clone() for key, value in dense.state_dict().items()}
    model = upcycle(dense, 4, fraction=0.0)
    torch.testing.assert_close(model(IDS).logits, dense(IDS).logits)
    assert sum(isinstance(m, MoE) for m in model.modules()) == 2 and "tokens_per_expert" in model(IDS).aux
    assert all(torch.equal(value, before[key]) for key, value in dense.state_dict().items())


@pytest.mark.parametrize("separate", [False, True])
def test_a_drawn_share_of_units_is_new_in_every_expert(separate):
    dense = TransformerLM(17, 16, 1, 2, d_ff=40)
    model = upcycle(dense, 3, fraction=0.3, separate=separate)
    bank = model.blocks[0].layers["feedforward"].expert_inner_function
    old = dense.blocks[0].layers["feedforward"]
    first = (bank.lin1_weight != old.fc1.weight.T).all(1)  # (e f)
    second = (bank.lin2_weight != old.fc2.weight.T).all(2)
    assert first.sum(1).tolist() == second.sum(1).tolist() == [12, 12, 12]
    assert torch.equal(first, second) != separate
    assert not torch.equal(first[0], first[1])
    kept = ~first
    assert all(torch.equal(bank.lin1_weight[e][:, kept[e]], old.fc1.weight.T[:, kept[e]]) for e in range(3))
    new = bank.lin1_weight.transpose(1, 2)[first]
    assert 0.6 < new.std() / old.fc1.weight.std() < 1.5
    again = upcycle(dense, 3, fraction=0.3, generator=torch.Generator().manual_seed(1))
    same = upcycle(dense, 3, fraction=0.3, generator=torch.Generator().manual_seed(1))
    assert all(
        torch.equal(a, b) for (n, a), b in zip(again.state_dict().items(), same.state_dict().values()) if "expert" in n
    )


ALL = {"router_options": {"renormalise": True}, "top_k": 2, "capacity_factor": None}
PAIRS = {
    "transformer": (lambda: TransformerLM(17, 16, 2, 2), lambda: TransformerLM(17, 16, 2, 2, n_experts=4, **ALL)),
    "one expert": (lambda: MoEMambaLM(17, 16, 2, 1, d_state=4), lambda: MoEMambaLM(17, 16, 2, 4, d_state=4, **ALL)),
}


@pytest.mark.parametrize("dense, mixture", PAIRS.values(), ids=PAIRS)
def test_training_starts_from_a_dense_run(dense, mixture, tmp_path):
    dense, model = dense().eval(), mixture().eval()
    torch.save(dense.state_dict(), tmp_path / "dense.pt")
    said = start_from(model, str(tmp_path / "dense.pt"), upcycle=0.0)
    assert "experts made of dense layers, 0% of their units drawn anew" in said and "gating.gate" in said
    torch.testing.assert_close(model(IDS).logits, dense(IDS).logits)
    start_from(model, str(tmp_path / "dense.pt"), upcycle=0.5)
    assert (model(IDS).logits - dense(IDS).logits).norm() > 1e-3


def test_experts_that_the_file_has_are_taken_as_they_are(tmp_path):
    model, other = (TransformerLM(17, 16, 2, 2, n_experts=4) for _ in range(2))
    torch.save(other.state_dict(), tmp_path / "experts.pt")
    assert "drawn anew" not in start_from(model, str(tmp_path / "experts.pt"))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values()))
    state = other.state_dict()
    assert upcycled_state(model, state).keys() == state.keys()


def test_what_cannot_become_experts_is_refused():
    with pytest.raises(ValueError, match="MambaLM has no dense feed-forward"):
        upcycle(MambaLM(17, 16, 1), 4)
    with pytest.raises(ValueError, match=r"fraction = 1.5 .* must lie in \[0, 1\]"):
        upcycle(TransformerLM(17, 16, 1, 2), 4, fraction=1.5)
