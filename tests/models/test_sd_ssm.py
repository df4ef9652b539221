"""SD-SSM and its baselines: parameter counts, initialisation, token ids as one-hot vectors, carried state,
exactness."""

import math

import pytest
import torch
import torch.nn.functional as F

from ssmzoo.data.automata_library import BENCHMARK, automaton
from ssmzoo.layers.state import map_state, select_rows
from ssmzoo.models.complex_diagonal_ssm import ComplexDiagonalModel
from ssmzoo.models.rnn import RNNModel, RNNState
from ssmzoo.models.sd_ssm import SDSSMModel, append_query_token
from ssmzoo.released.load import load_official
from ssmzoo.zoo import create_model

MODELS = {
    "sd_ssm": lambda: SDSSMModel(4, 3, state_size=7, num_transition_matrices=3),
    "sd_ssm, nonlinear": lambda: SDSSMModel(4, 3, state_size=7, mlp_size=5, init="identity"),
    "complex diagonal": lambda: ComplexDiagonalModel(4, 3, state_size=5),
    "complex diagonal, 3 layers": lambda: ComplexDiagonalModel(4, 3, state_size=5, n_layer=3, embed_size=6),
    "complex diagonal, no B, linear": lambda: ComplexDiagonalModel(4, 3, state_size=5, use_B=False, readout="linear"),
    "lstm": lambda: RNNModel(4, 3, state_size=5, num_layers=2),
    "rnn": lambda: RNNModel(4, 3, state_size=5, cell="tanh"),
}
every_model = pytest.mark.parametrize("name", MODELS)


@pytest.fixture
def model(name):
    torch.manual_seed(0)
    return MODELS[name]().double().eval()


@pytest.mark.parametrize(
    "language, K, extra, expected",
    [
        ("parity", 8, 1, 33_250),
        ("even_pairs", 8, 1, 33_250),
        ("cycle", 8, 1, 33_517),
        ("modular_arithmetic", 18, 1, 75_019),
        ("C2xC4", 6, 0, 25_370),
        ("D4", 6, 0, 25_370),
        ("A5", 6, 0, 28_750),
    ],
)
def test_published_parameter_counts(language, K, extra, expected):
    table = automaton(language)
    model = SDSSMModel(table.num_symbols + extra, table.num_classes, 64, K)
    assert sum(p.numel() for p in model.parameters()) == expected


def test_published_size_of_the_complex_diagonal_baseline():
    assert sum(p.numel() for p in ComplexDiagonalModel(3, 5, 64).parameters()) == 51_470


def test_initialisation():
    model = SDSSMModel(3, 5, 64, 8)
    bound = math.sqrt(6 / 128)
    assert 0.95 * bound < model.block.A_dict.abs().max() <= bound
    near = SDSSMModel(3, 5, 64, 8, init="identity", init_noise=0.01).block.A_dict
    assert (near.mean(-1) - torch.eye(64)).abs().max() < 0.03
    phasors = ComplexDiagonalModel(3, 5, 16).blocks[0].init_state
    assert torch.allclose(phasors.abs(), torch.ones(16))
    assert "blocks.0.init_state" in ComplexDiagonalModel(3, 5, 16).state_dict()
    loss = F.cross_entropy(model(torch.randint(3, (64, 20))).logits[:, -1], torch.randint(5, (64,)))
    assert abs(float(loss.detach()) - math.log(5)) < 0.5


def test_phasors_survive_a_change_of_precision():
    model = ComplexDiagonalModel(3, 5, 16)
    before = model.blocks[0].init_state.clone()
    after = model.double().bfloat16().float().blocks[0].init_state
    assert after.dtype == torch.complex64 and (after - before).abs().max() < 0.02
    assert model.double().blocks[0].init_state.dtype == torch.complex128


@every_model
def test_token_ids_are_one_hot_vectors(model):
    ids, results = torch.randint(4, (3, 9)), []
    for x in (ids, F.one_hot(ids, 4).double()):
        logits = model(x).logits
        results.append((logits, *torch.autograd.grad(logits.square().sum(), list(model.parameters()))))
    torch.testing.assert_close(*results)


@every_model
def test_what_a_hook_changes_on_the_way_reaches_the_logits(model):
    ids = torch.randint(4, (3, 9))
    plain = model(ids).logits
    for part in [m for m in model.modules() if type(m) in (torch.nn.Linear, torch.nn.ReLU, torch.nn.Sequential)]:
        hook = part.register_forward_hook(lambda module, given, result: result.square() + 1)
        assert not torch.allclose(model(ids).logits, plain)
        hook.remove()


@every_model
def test_every_parameter_learns(model):
    model(torch.randint(4, (8, 9))).logits.square().sum().backward()
    dead = [n for n, p in model.named_parameters() if p.grad is None or p.grad.abs().sum() == 0]
    assert dead == []


@every_model
def test_chunks_and_single_steps(model):
    ids = torch.randint(4, (3, 11))
    whole = model(ids)
    start = model.allocate_state(3, dtype=torch.float64)
    torch.testing.assert_close(model(ids, start).logits, whole.logits)
    for cuts in ((4, 7), (1,) * 11):
        state, parts = None, []
        for piece in ids.split(cuts, dim=1):
            logits, state, _ = model(piece, state)
            parts.append(logits)
        torch.testing.assert_close(torch.cat(parts, 1), whole.logits)
    torch.testing.assert_close(state, whole.state)
    rows = torch.tensor([2, 0])
    torch.testing.assert_close(
        model(ids[rows][:, :1], select_rows(whole.state, rows)).logits, model(ids[:, :1], whole.state).logits[rows]
    )


@every_model
def test_padding_and_packing(model):
    ids = torch.randint(4, (2, 8))
    mask = torch.tensor([[0, 0, 1, 1, 1, 0, 1, 1], [1, 1, 1, 1, 1, 0, 0, 0]], dtype=torch.bool)
    padded = model(ids, mask=mask)
    for row in range(2):
        alone = model(ids[row : row + 1, mask[row]])
        torch.testing.assert_close(padded.logits[row, mask[row]], alone.logits[0])
        torch.testing.assert_close(map_state(lambda s, row=row: s[row : row + 1], padded.state), alone.state)
    seq_idx = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2], [0, 1, 1, 1, 1, 1, 1, 1]])
    packed = model(ids, seq_idx=seq_idx).logits
    torch.testing.assert_close(packed[0, 3:7], model(ids[:1, 3:7]).logits[0])
    torch.testing.assert_close(packed[1, 1:], model(ids[1:, 1:]).logits[0])


@pytest.mark.parametrize("language", BENCHMARK)
def test_the_architecture_holds_every_benchmark_exactly(language):
    """Written in by hand: states are e_q - e_0, transitions are the automaton's, W_b makes up for the zero start."""
    table = automaton(language)
    q, e = table.num_states + 1, table.num_symbols  # one more state takes the moves that cannot come
    delta = torch.from_numpy(table.delta)
    delta = torch.where(delta < 0, q - 1, delta)
    model = SDSSMModel(e, table.num_classes, q, e, p_norm=1.3).eval()
    with torch.no_grad():
        model.block.A_selector.weight.copy_(100 * torch.eye(e))
        model.block.A_selector.bias.zero_()
        model.block.A_dict.zero_()
        model.block.B.weight.zero_()
        model.block.B.weight[table.initial_state] = -1
        for s in range(e):
            columns = torch.arange(q)
            model.block.A_dict[torch.cat([delta[:, s], torch.tensor([q - 1])]), columns, s] = 1
            model.block.B.weight[delta[table.initial_state, s], s] += 1
        model.norm.weight.fill_(1.0)
        model.readout.bias.zero_()
        model.readout.weight.zero_()
        output = torch.from_numpy(table.output)
        ends = (output >= 0).nonzero().squeeze(1)
        model.readout.weight[output[ends], ends] = 1
        if table.initial_state in ends:  # e_0 - e_0 = 0: nothing stands out
            model.readout.bias[output[table.initial_state]] = 0.5
    import numpy as np

    ids, states = table.draw(np.random.default_rng(0), 8, 400)
    wanted = output[torch.from_numpy(states.copy())]
    with torch.no_grad():
        answers = model(torch.from_numpy(ids.copy())).logits.argmax(-1)
    assert (answers == wanted)[wanted >= 0].all()


def test_state_penalty_is_an_auxiliary_loss():
    model = SDSSMModel(3, 2, 8, state_penalty=0.1, state_cap=0.0)
    out = model(torch.randint(3, (2, 5)))
    assert set(out.aux) == {"state_loss"} and out.aux["state_loss"] > 0
    assert model.eval()(torch.randint(3, (2, 5))).aux == {}


def test_query_token():
    x = append_query_token(F.one_hot(torch.tensor([[0, 1]]), 2).float())
    assert x.tolist() == [[[1, 0, 0], [0, 1, 0], [0, 0, 1]]]


def test_bad_arguments():
    for arguments, message in (
        ({"p_norm": 0.5}, "p_norm = 0.5"),
        ({"init": "zeros"}, "'xavier'"),
        ({"state_size": 0}, "d_state = 0"),
        ({"mlp_size": 0}, "mlp_size = 0"),
    ):
        with pytest.raises(ValueError, match=message):
            SDSSMModel(**arguments)
    with pytest.raises(ValueError, match="several need use_B"):
        ComplexDiagonalModel(n_layer=2, use_B=False)
    with pytest.raises(ValueError, match="'lstm', 'relu' or 'tanh'"):
        RNNModel(cell="gru")
    with pytest.raises(ValueError, match="one direction"):
        load_official("regular_rnn_baselines", {}, output_size=2, input_size=2, state_size=4, bidirectional=True)


@pytest.mark.parametrize("name", ["sd_ssm", "complex_diagonal_ssm", "lstm", "rnn"])
def test_presets_build(name):
    model = create_model(name, input_size=3, num_classes=2)
    assert model(torch.zeros(1, 2, dtype=torch.long)).logits.shape == (1, 2, 2)


@pytest.mark.parametrize("cell", ["relu", "tanh"])
def test_the_rnn_trains_as_torchs_cell_does(cell, monkeypatch):
    torch.manual_seed(0)
    model, ids = RNNModel(4, 3, state_size=5, num_layers=2, cell=cell), torch.randint(4, (3, 7))
    h = torch.randn(3, 2, 5, requires_grad=True)

    def gradients():
        logits, state, _ = model(ids, RNNState(h))
        loss = logits.square().sum() + state.h.sin().sum()
        first = torch.autograd.grad(loss, [h, *model.parameters()], create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), list(model.parameters()))
        return [logits, state.h, *first, *second]

    found = gradients()
    monkeypatch.setattr(RNNModel, "_trains_by_steps", lambda self, x: False)
    torch.testing.assert_close(found, gradients())
