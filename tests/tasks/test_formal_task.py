"""The formal task: losses with known answers, the curve of lengths, training as a user runs it, and exactness at
length."""

import csv

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from paths import ROOT
from torch import nn

from ssmzoo.data.automata_library import automaton
from ssmzoo.data.formal import FormalData
from ssmzoo.layers.state import ModelOutput
from ssmzoo.models.rnn import RNNModel
from ssmzoo.models.sd_ssm import SDSSMModel
from ssmzoo.tasks.formal import IGNORE, FormalLanguage, consistency
from ssmzoo.tasks.learnt_states import LearntStates
from ssmzoo.tasks.metrics.formal import LengthCurve, StreamCurve


def test_consistency_is_the_share_of_variance_within_classes():
    labels = torch.tensor([0, 0, 1, 1])
    assert float(consistency(F.one_hot(labels, 2).float() * 7, labels, 2)) == 0
    z = torch.tensor([[0.0], [2.0], [10.0], [12.0]])
    assert float(consistency(z, labels, 2)) == pytest.approx(1 / 26)
    assert float(consistency(3 * z + 5, labels, 2)) == pytest.approx(1 / 26)  # neither scale nor offset matter


def test_loss_looks_at_labels_and_at_the_first_classes_only():
    model = RNNModel(4, 7, state_size=5)
    task = FormalLanguage(model, num_classes=3)
    ids = torch.randint(4, (2, 6))
    labels = torch.randint(3, (2, 6))
    labels[:, :4] = IGNORE
    out = task.step({"input_ids": ids, "labels": labels}, training=True)
    logits = model(ids).logits[:, 4:, :3]
    torch.testing.assert_close(out.loss, F.cross_entropy(logits.flatten(0, 1), labels[:, 4:].flatten()))
    nothing = task.step({"input_ids": ids, "labels": torch.full_like(ids, IGNORE)}, training=True)
    assert nothing.loss == 0


def test_length_curve_counts_exactly():
    curve = LengthCurve(3)
    asked = np.array([[True, True, False], [True, True, True]])
    right = np.array([[True, False, False], [True, True, True]])
    curve.add(right, asked, np.arange(6, dtype=np.uint64).reshape(2, 3))
    assert curve.right.tolist() == [0, 2, 1, 1] and curve.count.tolist() == [0, 2, 2, 1]
    assert curve.first_below_100 == 2 and curve.distinct == 5 and curve.mean() == pytest.approx(250 / 3)
    query = LengthCurve(2)
    last = np.array([[False, False, True]])
    query.add(last, last, np.zeros((1, 3), np.uint64), query=True)
    assert query.count.tolist() == [0, 0, 1] and query.right.tolist() == [0, 0, 1]


def test_stream_curve_finds_the_first_mistake():
    curve = StreamCurve()
    curve.add(np.ones((2, 4), bool), np.ones((2, 4), bool))
    right = np.ones((2, 4), bool)
    right[1, 2] = False
    curve.add(right, np.ones((2, 4), bool))
    assert curve.first_wrong == 7 and curve.length == 8


def perfect_parity() -> SDSSMModel:
    """e_1 - e_0 after an odd number of ones."""
    model = SDSSMModel(2, 2, 2, 2).eval()
    with torch.no_grad():
        model.block.A_selector.weight.copy_(100 * torch.eye(2))
        model.block.A_selector.bias.zero_()
        model.block.A_dict.copy_(torch.stack([torch.eye(2), torch.eye(2).flip(0)], -1))
        model.block.B.weight.copy_(torch.tensor([[0.0, -1.0], [0.0, 1.0]]))
        model.readout.weight.copy_(torch.eye(2))
        model.readout.bias.copy_(torch.tensor([0.5, 0.0]))
    return model


@pytest.mark.parametrize("mode", ["prefixes", "independent"])
def test_a_perfect_model_is_perfect_at_every_length(mode):
    data = FormalData("parity", test_length=60, test_samples=16, test_strings=mode)
    curve = FormalLanguage(perfect_parity()).length_curve(data)
    assert curve.first_below_100 is None and (curve.count[1:] >= 8).all()
    curve = FormalLanguage(SDSSMModel(2, 2, 4)).length_curve(data)
    assert curve.first_below_100 is not None


def test_long_strings_in_chunks():
    data = FormalData("parity")
    task = FormalLanguage(perfect_parity(), long_rows=2, long_length=5000, long_chunk=700)
    curve = task.stream_curve(data)
    assert curve.length == 5000 and curve.first_wrong is None


class Turning(nn.Module):
    """Parity as the sign of a point on a circle: half a turn for every 1, and a little too far for every symbol."""

    def forward(self, input_ids, state=None):
        turn = torch.view_as_complex(torch.stack([torch.ones(len(input_ids)), torch.zeros(len(input_ids))], -1))
        turn = turn if state is None else torch.view_as_complex(state[0])  # (b)
        steps = torch.polar(torch.ones(input_ids.shape), torch.pi * input_ids + 0.002)
        at = turn[:, None] * steps.cumprod(1)  # (b l)
        return ModelOutput(torch.stack([at.real, -at.real], -1), (torch.view_as_real(at[:, -1]),), {})


def test_learnt_states_undo_a_drift():
    data = FormalData("parity")
    task = FormalLanguage(Turning(), long_rows=3, long_length=5000, long_chunk=1000)
    assert 700 < task.stream_curve(data).first_wrong < 900  # a quarter of a turn of 0.002
    snapped = task.stream_curve(data, snap=300)
    assert snapped.length == 5000 and snapped.first_wrong is None


class Exact(nn.Module):
    """An automaton whose state is one number."""

    def __init__(self, language):
        super().__init__()
        self.delta, self.start = torch.from_numpy(language.delta), language.initial_state

    def forward(self, input_ids, state=None):
        at = torch.full((len(input_ids),), self.start) if state is None else state[0][:, 0].long()
        for symbol in input_ids.T:
            at = self.delta[at, symbol]
        return ModelOutput(torch.zeros(*input_ids.shape, 2), (at[:, None].float(),), {})


@pytest.mark.parametrize("name", ["parity", "cycle", "D4", "A5", "D30", "C2xC30"])
def test_learnt_states_are_of_every_state_of_the_automaton(name):
    data = FormalData(name, skewed=0.5)
    learnt = FormalLanguage(Exact(data.language)).learnt_states(data)
    assert learnt.rows.shape == (4096, 1)
    assert set(learnt.rows[:, 0].int().tolist()) == set(data.language.reachable())


def test_learnt_states_do_not_fit_a_state_that_grows():
    learnt = LearntStates((torch.zeros(8, 5, 2),))
    assert learnt.nearest((torch.ones(3, 5, 2),))[0].shape == (3, 5, 2)
    with pytest.raises(ValueError, match="grows with the string"):
        learnt.nearest((torch.zeros(3, 7, 2),))


def test_a_small_state_warns():
    class Trainer:
        datamodule = FormalData("A5")

    task = FormalLanguage(SDSSMModel(2, 60, 8), num_classes=60)
    task._trainer = Trainer()
    with pytest.warns(UserWarning, match="state_size = 8 is below the 60 states"):
        task.on_fit_start()


SHORT = [
    "trainer.accelerator=cpu",
    "trainer.max_steps=4",
    "trainer.val_check_interval=2",
    "data.batch_size=8",
    "data.test_length=60",
    "data.test_samples=8",
    "data.val_samples=4",
]


@pytest.mark.parametrize(
    "arguments",
    [
        ["model=lstm", "data.language=D4"],
        ["model=complex_diagonal_ssm", "data.supervise=last", "data.query_token=true", "data.curriculum=uniform"],
        ["model=mamba", "data=formal", "task=formal", "data.language=parity", "model.d_model=16", "model.n_layer=1"],
        [
            "model=transformer",
            "data=formal",
            "task=formal",
            "data.language=A5",
            "model.d_model=16",
            "model.n_blocks=1",
            "model.n_heads=2",
        ],
        ["model=sd_ssm", "data.regex='(ab)*'", "data.alphabet=ab"],
        ["model=sd_ssm", "data.generators=[[1,0,2],[1,2,0]]"],
    ],
    ids=lambda a: a[0].split("=")[1],
)
def test_any_sequence_model_on_any_language(call, tmp_path, arguments):
    if "data.regex" in arguments[1]:
        pytest.importorskip("automata")
    status, out, err = call(*arguments, *SHORT, "name=a")
    assert status == 0, err
    run = next(tmp_path.glob("runs/*/a"))
    assert (run / "lengths.png").stat().st_size > 0 and "first length under 100 %" in out
    with open(run / "lengths.csv") as file:
        lengths = [int(r["length"]) for r in csv.DictReader(file)]
    assert lengths == list(range(1, 61))


@pytest.mark.parametrize(
    "arguments",
    [
        ["data=formal_words", "data.group=S3", "data.test_lengths=[8]", "data.val_samples=8"],
        ["data=formal_fixedset", "data.language=cycle_nav", "data.val_samples=8"],
    ],
)
def test_other_protocols(call, arguments):
    status, out, err = call("model=lstm", *arguments, *SHORT[:4], "name=a")
    assert status == 0 and "validation accuracy" in out, err


def test_bad_input_is_one_message(call, tmp_path):
    (tmp_path / "bad.yaml").write_text("delta: [[0, 1], [0]]\n")
    for argument, message in (
        ("data.language=parityy", "unknown language 'parityy'"),
        (f"data.automaton={tmp_path / 'bad.yaml'}", "delta[1] lacks 1 of 2 transitions"),
        ("data.min_length=0", "data.min_length is 0"),
        ("data.generators=[[0,0]]", "generators[0]"),
        ("data.test_length=0", "data.test_length is 0"),
    ):
        status, _, err = call("model=sd_ssm", argument)
        assert status == 2 and message in err and err.count("\n") <= 2


@pytest.mark.parametrize("language", ["parity", "even_pairs"])
def test_sd_ssm_learns_to_generalise_in_length(call, tmp_path, language):
    """A small model of the published kind, trained to 20 symbols, answers every string of up to 300."""
    status, out, err = call(
        "model=sd_ssm",
        f"data.language={language}",
        "model.state_size=16",
        "data.batch_size=64",
        "model.num_transition_matrices=4",
        "data.max_length=20",
        "data.curriculum_steps=150",
        "trainer.max_steps=500",
        "trainer.val_check_interval=250",
        "data.test_length=300",
        "name=a",
        "data.test_samples=128",
        "trainer.accelerator=cpu",
    )
    assert status == 0, err
    assert "none up to 300" in out
    status, out, err = call(f"ckpt={tmp_path / 'runs/sd_ssm/a'}", "task.long_length=2000", entry="eval")
    assert status == 0, err
    assert "none up to 2,000" in out


def test_probe_figures_and_words(tmp_path):
    from ssmzoo.probes.expressivity import summarise

    model = perfect_parity()
    summary = summarise(model, automaton("parity"), tmp_path, steps=500)
    assert "lead to the right state: 100.0 %" in summary.text and "wrong answer up to 500: 0 of 10" in summary.text
    assert {f.name for f in summary.figures} == {"transitions.png", "spectrum.png", "trajectories.png", "drift.png"}


def test_probe_reads_mambas_diagonal(tmp_path):
    from ssmzoo.models.mamba import MambaLM
    from ssmzoo.probes.expressivity import diagonal_transitions, draw, summarise

    model = MambaLM(8, d_model=16, n_layer=2).eval()
    ids, _ = draw(automaton("D4"), 4, 20)
    values = diagonal_transitions(model, ids, 2)
    assert len(values) == 2 and all(((v > 0) & (v < 1)).all() for v in values)
    assert "they commute" in summarise(model, automaton("D4"), tmp_path, steps=200).text


def test_notebook_runs():
    """notebooks/expressivity.ipynb, from the shipped checkpoints to the last figure."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = nbformat.read(ROOT / "notebooks/expressivity.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=1200, resources={"metadata": {"path": str(ROOT / "notebooks")}}).execute()
    text = "".join(o.get("text", "") for cell in notebook.cells for o in cell.get("outputs", []))
    assert "lead to the right state: 100.0 %" in text and "0 of 200" in text and "they commute" in text
