"""Training behind a prefix, and reading twice, from the command line and by hand."""

import csv

import pytest
import torch

from ssmzoo.data.recall.data import RecallData
from ssmzoo.layers.state import ModelOutput
from ssmzoo.models.based import BasedLM
from ssmzoo.models.baselines import TransformerLM
from ssmzoo.models.gated_ssm import GatedSSMLM
from ssmzoo.models.jrt_rnn import JRTRNNLM
from ssmzoo.tasks.language import token_cross_entropy
from ssmzoo.tasks.prefix_language import PrefixLanguageModeling
from ssmzoo.tasks.recall import Recall

TINY = {"vocab_size": 256, "d_model": 16, "n_layer": 2, "n_heads": 2, "feature_dim": 2, "d_ff": 8, "n_positions": 0}
SMALL = ["trainer.max_steps=2", "trainer.val_check_interval=2", "trainer.accelerator=cpu", "name=a",
         "trainer.log_every_n_steps=1",
         "data.batch_size=2", "trainer.limit_val_batches=2", "model.d_model=24", "model.n_layer=4"]  # fmt: skip
TEXT = ["data.seq_len=32", "data.val_tokens=512", "task.sample_tokens=4"]


def tiny_jrt() -> JRTRNNLM:
    torch.manual_seed(0)
    return JRTRNNLM(**TINY, layer_pattern="CP")


def test_the_loss_is_next_tokens_behind_and_masked_tokens_within():
    seen = []
    model = tiny_jrt()
    task = PrefixLanguageModeling(model, prefix=6, mlm_probability=0.5)
    ids = torch.randint(256, (3, 10))
    batch = {"input_ids": ids, "labels": torch.cat([ids[:, 1:], ids[:, :1]], dim=1)}
    forward = model.forward
    model.forward = lambda *a, **k: seen.append((a, k, forward(*a, **k))) or seen[-1][2]
    out = task.step(batch, training=True)
    (given,), more, result = seen[0]
    hidden = given != ids
    assert (
        more["prefix"] == 6 and hidden.any() and not hidden[:, 6:].any() and (given[hidden] == model.mask_token).all()
    )
    behind = token_cross_entropy(result.logits[:, 6:], batch["labels"][:, 6:])[0]
    within = token_cross_entropy(result.logits[hidden][None], ids[hidden][None])[0]
    assert torch.allclose(out.loss, behind) and torch.allclose(out.auxiliary, 0.25 * within)
    assert out.count == task.labelled(batch) == 12
    plain = task.step(batch, training=False)
    assert plain.auxiliary is None and torch.equal(seen[1][0][0], ids) and seen[1][1]["prefix"] == 6


def test_other_models_with_a_prefix_are_trained_so_too():
    ids = torch.randint(50, (2, 8))
    batch = {"input_ids": ids, "labels": ids}
    for model in (
        TransformerLM(64, 16, 1, 2),
        GatedSSMLM(vocab_size=64, d_model=16, d_state=8, n_layer=2),
    ):
        out = PrefixLanguageModeling(model, mask_token=63).step(batch, training=True)
        assert out.loss.isfinite() and out.auxiliary.isfinite() and out.count == 8


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"prefix": 0}, "prefix=0 must be at least 1"),
        ({"mlm_probability": 1.5}, "mlm_probability=1.5 between 0 and 1"),
        ({"mlm_weight": -1}, "mlm_weight=-1 at least 0"),
    ],
)
def test_bad_settings_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        PrefixLanguageModeling(tiny_jrt(), **arguments)


def test_what_cannot_be_trained_so_is_refused():
    with pytest.raises(ValueError, match="BasedLM reads in one direction only"):
        PrefixLanguageModeling(BasedLM(**TINY, layer_pattern="CT"))
    with pytest.raises(ValueError, match="keeps no row for it"):
        PrefixLanguageModeling(JRTRNNLM(**TINY, layer_pattern="CP", mask_row=False))
    with pytest.raises(ValueError, match="task.prefix = 10 leaves nothing to predict of 10 tokens"):
        PrefixLanguageModeling(tiny_jrt(), prefix=10).step({"input_ids": torch.zeros(1, 10, dtype=torch.long)}, False)


def test_a_prefix_as_long_as_the_sequence_is_refused_before_anything_runs(call, tmp_path):
    status, _, err = call("model=jrt_rnn", f"runs_dir={tmp_path}", *SMALL, *TEXT, "task.prefix=32")
    assert (
        status == 2 and "task.prefix = 32 leaves nothing to predict of 32 tokens" in err and len(err.splitlines()) == 1
    )
    assert not any(tmp_path.rglob("metrics.csv"))


@pytest.mark.parametrize("model", [pytest.param("based", marks=pytest.mark.slow), "jrt_rnn"])
def test_it_trains_evaluates_and_generates(call, tmp_path, model):
    status, out, err = call(f"model={model}", f"runs_dir={tmp_path}", *SMALL, *TEXT)
    assert (status, err) == (0, ""), err
    run = tmp_path / model / "a"
    rows = list(csv.DictReader((run / "metrics.csv").open()))
    assert any(row.get("train/cross_entropy") for row in rows)
    status, out, err = call(f"ckpt={run}", "task.read_twice=true", "task.eval_lengths=[1]", entry="eval")
    assert (status, err) == (0, ""), err
    assert "first half read once" in out and "first half read twice" in out
    arguments = ["generate", str(run), "--prompt", "import", "--max-new-tokens", "3", "--greedy"]
    once = call(*arguments, entry="ssmzoo")
    twice = call(*arguments, "--read-twice", entry="ssmzoo")
    assert once[0] == twice[0] == 0 and twice[1].startswith("import")


@pytest.mark.parametrize("flags", [["task.read_twice=true"], ["task.prefix=true"]])
def test_recall_of_a_context_read_twice_or_both_ways(call, tmp_path, flags):
    sizes = ["data.train=[[16,2]]", "data.test=[[16,2],[16,4]]", "data.val_samples=4", "data.test_samples=4"]
    status, _, err = call("model=jrt_rnn", "data=mqar", f"runs_dir={tmp_path}", *SMALL, *sizes)
    assert (status, err) == (0, ""), err
    status, out, err = call(f"ckpt={tmp_path / 'jrt_rnn' / 'a'}", *flags, entry="eval")
    assert (status, err) == (0, "") and "mqar, every test size" in out


class Recorder(torch.nn.Module):
    def forward(self, ids, prefix=None):
        self.seen = ids, prefix
        return ModelOutput(torch.nn.functional.one_hot(ids, 64).float(), None, {})


def test_the_second_reading_is_the_one_that_is_judged():
    model, data = Recorder(), RecallData("mqar", train=[[16, 2]], test=[[16, 2]])
    batch = next(iter(data.test_batches()))
    ids, labels = batch["input_ids"], batch["labels"]
    start = int((labels != -100).any(0).nonzero()[0])
    logits, _ = Recall(model, read_twice=True, prefix=True).answers(ids, labels)
    assert torch.equal(model.seen[0], torch.cat([ids[:, :start], ids], dim=1)) and model.seen[1] == 2 * start
    assert torch.equal(logits.argmax(-1), ids) and start >= 4
    with pytest.raises(ValueError, match="asks from the first token on"):
        Recall(model, read_twice=True).answers(ids, torch.zeros_like(labels))
