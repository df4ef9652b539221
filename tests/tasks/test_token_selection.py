"""Token-selective losses: which tokens are kept, what the loss then is, and how batches weigh."""

import pytest
import torch
import torch.nn.functional as F

from ssmzoo import create_model
from ssmzoo.tasks.language import LanguageModeling, token_cross_entropy
from ssmzoo.tasks.objectives.tokens import kept_tokens, select_tokens
from ssmzoo.tasks.prefix_language import PrefixLanguageModeling


def batch():
    torch.manual_seed(0)
    logits, labels = 3 * torch.randn(2, 9, 7), torch.randint(7, (2, 9))
    labels[0, :4] = -100
    return logits, labels


@pytest.mark.parametrize("share, count", [(1.0, 14), (0.5, 7), (0.6, 9), (0.01, 1)])
@pytest.mark.parametrize("by", ["loss", "entropy"])
def test_the_hardest_tokens_are_kept(share, count, by):
    logits, labels = batch()
    found = select_tokens(logits, labels, share, by)
    kept = found != -100
    assert int(kept.sum()) == count == kept_tokens(torch.tensor(14), share) and torch.equal(found[kept], labels[kept])
    p = logits.softmax(-1)
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=-100).view(2, 9)
    score = loss if by == "loss" else -(p * p.log()).sum(-1)
    left_out = (labels != -100) & ~kept
    assert not left_out.any() or score[kept].min() >= score[left_out].max()


def test_ties_keep_the_share():
    labels = torch.zeros(1, 10, dtype=torch.long)
    assert int((select_tokens(torch.zeros(1, 10, 4), labels, 0.3) != -100).sum()) == 3


def test_no_labels_at_all():
    logits, labels = torch.zeros(1, 4, 3), torch.full((1, 4), -100)
    assert torch.equal(select_tokens(logits, labels, 0.5), labels)


def test_the_training_loss_is_that_of_the_kept_tokens_and_validation_that_of_all():
    torch.manual_seed(0)
    model = create_model("mamba", vocab_size=16, d_model=16, n_layer=1)
    ids = torch.randint(16, (2, 12))
    both = {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}
    task = LanguageModeling(model, keep_tokens=0.5)
    logits = model(both["input_ids"]).logits
    everything, _ = token_cross_entropy(logits, both["labels"])
    hard, count = token_cross_entropy(logits, select_tokens(logits, both["labels"], 0.5))
    trained, validated = task.step(both, training=True), task.step(both, training=False)
    torch.testing.assert_close(trained.loss, hard)
    torch.testing.assert_close(trained.metrics["cross_entropy"], everything.detach())
    torch.testing.assert_close(validated.loss, everything)
    assert hard > everything and int(task.labelled(both)) == int(count) == 11


def test_behind_a_prefix_the_hardest_next_tokens_are_kept_and_all_masked_ones():
    torch.manual_seed(0)
    model = create_model("jrt_rnn", vocab_size=16, d_model=24, d_ff=8)
    ids = torch.randint(16, (2, 13))
    both = {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}
    found = {}
    for share in (1.0, 0.5):
        task = PrefixLanguageModeling(model, prefix=4, keep_tokens=share)
        torch.manual_seed(1)
        found[share] = task.step(both, training=True)
        assert int(task.labelled(both)) == kept_tokens(16, share)
        quiet = PrefixLanguageModeling(model, prefix=4, mlm_weight=0, keep_tokens=share).step(both, training=True)
        logits = model(both["input_ids"], prefix=4).logits
        kept = select_tokens(logits, task.labels(both), share)
        torch.testing.assert_close(quiet.loss, token_cross_entropy(logits, kept)[0])
    hard, plain = found[0.5], found[1.0]
    assert hard.loss > plain.loss and torch.equal(hard.auxiliary, plain.auxiliary)
    torch.testing.assert_close(hard.metrics["cross_entropy"], plain.loss.detach())


@pytest.mark.parametrize(
    "words, arguments",
    [
        ("must lie in", {"keep_tokens": 0}),
        ("must lie in", {"keep_tokens": 60}),
        ("loss or entropy", {"keep_by": "los"}),
    ],
)
def test_a_share_that_is_none_is_refused(words, arguments):
    with pytest.raises(ValueError, match=words):
        LanguageModeling(torch.nn.Linear(1, 1), **arguments)
