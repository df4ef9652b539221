"""A training step and a decoding step never wait for the GPU: of every language, automaton and image model, of the
tasks around them, and of every operator by itself.

Two rules without a GPU (tests/synchronisation.py): a trace without values, and a run in which every place of ours that
reads a value in Python is noted. With a GPU, torch's own debug mode counts.
"""

import pytest
import torch
from synchronisation import watched, without_values
from test_state_contract import NODES, VOCAB
from tiny_images import build, tiny_models
from toy_operators import EXAMPLES

from ssmzoo import ops
from ssmzoo.layers.state import ModelOutput
from ssmzoo.ops.rows import write_rows
from ssmzoo.presets import build_model
from ssmzoo.tasks.classification import ImageClassification
from ssmzoo.tasks.formal import FormalLanguage
from ssmzoo.tasks.language import LanguageModeling
from ssmzoo.tasks.restoration import Restoration

IMAGES = tiny_models()
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def backward(out) -> None:
    losses = [v for k, v in out.aux.items() if k.endswith("_loss")]
    (out.logits.float().sum() + sum(v.sum() for v in losses)).backward()


def pictures_loss(out) -> torch.Tensor:
    return out.sum() if isinstance(out, torch.Tensor) else out[0].sum()


@pytest.mark.parametrize("name", NODES)
def test_a_trace_without_values_goes_through(name):
    model = build_model(NODES[name])
    with without_values() as traced:
        ids = traced.tensor(torch.zeros(2, 8, dtype=torch.long))
        backward(traced.move(model).train()(ids))


@pytest.mark.parametrize("name", NODES)
def test_no_language_or_automaton_model_reads_a_value(name):
    model, ids = build_model(NODES[name]), torch.randint(VOCAB, (2, 8))
    packs, mask = torch.arange(8).expand(2, 8) // 3, torch.ones(2, 1, dtype=torch.bool)
    with ops.backend("torch"), watched() as places:
        model.train()
        backward(model(ids))
        backward(model(ids, seq_idx=packs))
        model.eval()
        with torch.no_grad():
            state = model(ids).state
            state = model(ids[:, :1], state).state
            model(ids[:, :1], state, mask=mask)
    assert not places


@pytest.mark.parametrize("name", IMAGES)
def test_no_image_model_reads_a_value(name):
    model, x = build(IMAGES[name])
    model.train()
    with ops.backend("torch"):
        model(x)  # what is kept from call to call is made in the first
        with watched() as places:
            pictures_loss(model(x)).backward()
    assert not places


@pytest.mark.parametrize("name", EXAMPLES)
def test_no_operator_reads_a_value(name):
    function, make = EXAMPLES[name]()
    tensors = {k: t.requires_grad_() for k, t in make().items()}
    with ops.backend("torch"), watched() as places:
        results = function(**tensors)
        results = results if isinstance(results, tuple) else (results,)
        sum(r.sum() for r in results).backward()
    assert not places


class Maps(torch.nn.Module):
    """Stands for any model: pixels to classes, ids to logits, pictures to pictures."""

    num_classes, upscale = 5, 1

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, x, state=None, seq_idx=None):
        if x.ndim == 4:
            return x * self.weight
        logits = self.weight * torch.nn.functional.one_hot(x, 7).float()
        return ModelOutput(logits, None, {})


class Classes(Maps):
    def forward(self, x):
        return super().forward(x).mean((2, 3)).repeat(1, 2)[:, :5]


def test_no_task_reads_a_value():
    ids, labels = torch.randint(7, (2, 6)), torch.randint(5, (2, 6))
    labels[0, :2] = -100
    pictures = torch.rand(4, 3, 8, 8)
    text = dict(input_ids=ids, labels=labels)
    steps = [
        (LanguageModeling(Maps()), text),
        (LanguageModeling(Maps(), keep_tokens=0.5, keep_by="entropy"), text),
        (FormalLanguage(Maps(), num_classes=5, consistency=0.1), text),
        (ImageClassification(Classes()), dict(image=pictures, label=labels[1, :4])),
        (ImageClassification(Classes(), mixup=0.2, label_smoothing=0.1), dict(image=pictures, label=labels[1, :4])),
        (Restoration(Maps()), dict(lq=pictures, gt=pictures)),
    ]
    for task, batch in steps:
        if isinstance(task, LanguageModeling):
            task.labelled(batch)
        with ops.backend("torch"), watched() as places:
            task.step(batch, training=True).loss.backward()
        assert not [p for p in places if "one_hot" not in p], type(task).__name__


def test_the_rules_see_what_they_must():
    class Reader(torch.nn.Module):
        def forward(self, x):
            return x if bool((x > 0).all()) else -x

    with pytest.raises(Exception, match="reads values|local_scalar"), without_values() as traced:
        Reader()(traced.tensor(torch.ones(2)))
    with pytest.raises(Exception, match="shape|nonzero"), without_values() as traced:
        traced.tensor(torch.ones(2))[traced.tensor(torch.ones(2, dtype=torch.bool))]
    with pytest.raises(Exception, match="copied to the GPU"), without_values() as traced:
        traced.tensor(torch.ones(2)) * torch.tensor([1.0, 2.0])
    with watched() as places:
        write_rows(torch.zeros(3, 2), torch.tensor([0, -1]), torch.ones(2, 2))
    assert places and "write_rows" in places[0]


@gpu
@pytest.mark.parametrize("name", NODES)
def test_no_step_waits_for_the_gpu(name):
    model, ids = build_model(NODES[name]).cuda(), torch.randint(VOCAB, (2, 8), device="cuda")
    for measured in (False, True):  # the first pass compiles
        torch.cuda.set_sync_debug_mode("error" if measured else "default")
        try:
            backward(model.train()(ids))
            with torch.no_grad():
                model.eval()(ids[:, :1], model(ids).state)
        finally:
            torch.cuda.set_sync_debug_mode("default")
