"""Decoding over a state of its own is the model called token by token, bit for bit, where states grow and move too."""

from __future__ import annotations

import pytest
import torch
from against_reference import native
from test_one_call import FUSED, UNFUSED, model_of, quantise, tensors
from test_state_contract import VOCAB
from walker import leaves

from ssmzoo import ops
from ssmzoo.inference.decoding import Decoding
from ssmzoo.inference.generate import generate, prefill, stream
from ssmzoo.models.based import BasedLM
from ssmzoo.ops.token_step import session

MATRICES = ("in_proj", "out_proj", "x_proj", "dt_proj", "fc1", "fc2", "head", "lm_head")
pytestmark = native


@pytest.fixture(autouse=True)
def little_room(monkeypatch):
    monkeypatch.setattr(session, "ROOM", 1)


@torch.no_grad()
def called(model, ids, state):
    """Logits of every token, and the state at the end."""
    logits = []
    for token in ids.T:
        out = model(token[:, None], state)
        state = out.state
        logits.append(out.logits[:, -1])
    return torch.stack(logits), state


def decoded(decoding, ids):
    return torch.stack([decoding(token).clone() for token in ids.T])


def identical(got, expected):
    assert all(torch.equal(g, e) for g, e in zip(tensors(got), tensors(expected), strict=True))


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("b, threads", [(1, 2), (3, 1)])
def test_bit_for_bit(name, b, threads):
    model, ids = model_of(name), torch.randint(VOCAB, (b, 44))
    before, _ = torch.get_num_threads(), torch.set_num_threads(threads)
    try:
        _, start = prefill(model, ids[:, :4])
        kept = [t.clone() for t in tensors(start)]
        expected, end = called(model, ids[:, 4:], start)
        decoding = Decoding(model, start)
        got = decoded(decoding, ids[:, 4:])
    finally:
        torch.set_num_threads(before)
    assert decoding.session is not None and torch.equal(got, expected)
    identical(decoding.state, end)
    assert all(torch.equal(t, k) for t, k in zip(tensors(start), kept))
    again = Decoding(model, decoding.state)  # the rest from a state in the middle
    assert torch.equal(decoded(again, ids[:, :3]), called(model, ids[:, :3], end)[0])


@pytest.mark.parametrize("name", ["mamba", "mamba2", "mamba_hybrid"])
@pytest.mark.parametrize("bits", [8, 4])
def test_integers_bit_for_bit(name, bits):
    model = quantise(
        model_of(name), bits, ("in_proj", "out_proj", "x_proj", "dt_proj", "fc1", "fc2", "head", "lm_head")
    )
    ids = torch.randint(VOCAB, (3, 12))
    _, start = prefill(model, ids[:, :4])
    expected, end = called(model, ids[:, 4:], start)
    decoding = Decoding(model, start)
    assert torch.equal(decoded(decoding, ids[:, 4:]), expected) and decoding.session is not None
    identical(decoding.state, end)


@pytest.mark.parametrize("name", ["mamba", "mamba_hybrid", "hydra_lm", "gated_ssm", "moe_mamba", "based"])
def test_what_changes_in_the_model_acts_on_the_next_token(name):
    model, ids = model_of(name), torch.randint(VOCAB, (2, 5))
    _, state = prefill(model, ids[:, :4])
    decoding = Decoding(model, state)
    modules = [model, *(model.get_submodule(n) for n in leaves(model))]
    for m in modules:
        if m is not model and not list(m.parameters()):
            continue
        hook = m.register_forward_hook(doubled)
        expected, state = called(model, ids[:, 4:], state)
        torch.testing.assert_close(decoded(decoding, ids[:, 4:]), expected, rtol=1e-5, atol=1e-6)
        hook.remove()
        decoding = Decoding(model, state)
        expected, state = called(model, ids[:, 4:], state)
        assert torch.equal(decoded(decoding, ids[:, 4:]), expected) and decoding.session is not None
        if m is not model:
            m.weight.data = 1.3 * m.weight + 0.1
            expected, state = called(model, ids[:, 4:], state)
            assert torch.equal(decoded(decoding, ids[:, 4:]), expected)
    assert decoding.session is not None


def doubled(module, given, out):
    return out._replace(logits=2 * out.logits) if hasattr(out, "logits") else 2 * out


@pytest.mark.parametrize("name", UNFUSED)
def test_what_has_no_program_is_called(name):
    model, ids = model_of(name), torch.randint(VOCAB, (2, 9))
    _, start = prefill(model, ids[:, :4])
    kept = [t.clone() for t in tensors(start)]
    expected, end = called(model, ids[:, 4:], start)
    decoding = Decoding(model, start)
    torch.testing.assert_close(decoded(decoding, ids[:, 4:]), expected, rtol=1e-5, atol=1e-6)
    assert decoding.session is None and all(torch.equal(t, k) for t, k in zip(tensors(start), kept))
    for got, e in zip(tensors(decoding.state), tensors(end)):
        torch.testing.assert_close(got, e, rtol=1e-5, atol=1e-6)


def test_observers_and_backends_by_name_see_the_operators():
    model, ids, seen = model_of("mamba"), torch.randint(VOCAB, (1, 7)), []
    _, start = prefill(model, ids[:, :4])
    expected, _ = called(model, ids[:, 4:], start)
    decoding = Decoding(model, start)
    got = [decoding(ids[:, 4]).clone()]
    with ops.observe(mamba_step=lambda call, *a: seen.append(1) or call(*a)):
        got.append(decoding(ids[:, 5]).clone())
    assert len(seen) == len(model.backbone.layers)
    with ops.backend("torch"):
        got.append(decoding(ids[:, 6]).clone())
    torch.testing.assert_close(torch.stack(got), expected, rtol=1e-4, atol=1e-5)


def test_parts_of_a_model_that_are_not_plain_are_called():
    class Louder(type(model_of("based"))):
        def decode(self, *args, **kwargs):
            hidden, *rest = super().decode(*args, **kwargs)
            return 2 * hidden, *rest

    model, ids = model_of("based"), torch.randint(VOCAB, (1, 6))
    model.__class__ = Louder
    tables = BasedLM(VOCAB, 16, 2, 2, "TS", feature_dim=3, window=4, d_ff=16, n_positions=9).eval()
    for m in (model, tables):
        _, start = prefill(m, ids[:, :4])
        decoding = Decoding(m, start)
        assert torch.equal(decoded(decoding, ids[:, 4:]), called(m, ids[:, 4:], start)[0]) and decoding.session is None


def test_ids_without_a_row_and_sequences_that_have_ended():
    model = model_of("mamba_hybrid")
    _, start = prefill(model, torch.tensor([[1, 2], [3, 4]]))
    decoding = Decoding(model, start)
    with pytest.raises(IndexError, match=r"token ids \[1, 10000\] are not all rows of the embedding"):
        decoding(torch.tensor([1, 10000]))
    both = decoding(torch.tensor([1, 2])).clone()
    assert torch.equal(both, called(model, torch.tensor([[1], [2]]), start)[0][0])
    alive = torch.tensor([True, False])
    assert torch.equal(
        decoding(torch.tensor([5, 6]), alive)[0], called(model, torch.tensor([[1, 5], [2, 6]]), start)[0][1, 0]
    )


@pytest.mark.parametrize("name", ["mamba", "cheems", "transformer", "hydra_lm"])
def test_texts(name):
    """Of prompts of unequal lengths, some of which end early; a stream that is interrupted by a change of the model."""
    model, prompts = model_of(name), [[1, 2, 3, 4, 5], [6], [7, 8]]
    texts = generate(model, prompts, 20, greedy=True)
    for prompt, text in zip(prompts, texts):
        state, ids = None, list(prompt)
        for token in text:
            with torch.no_grad():
                logits, state, _ = model(torch.tensor([ids]), state)
            assert int(logits[0, -1].argmax()) == token
            ids = [token]
    stop = texts[0][4]
    cut = [text[: text.index(stop)] if stop in text else text for text in texts]
    assert generate(model, prompts, 20, greedy=True, stop_tokens=[stop]) == cut
    steps = stream(model, prompts[:1], 4, greedy=True)
    assert [int(next(steps)) for _ in range(2)] == texts[0][:2]
    head = getattr(model, model.head_name)
    head.register_forward_hook(lambda m, i, o: -o)
    after = next(steps)
    state, ids = None, torch.tensor([[*prompts[0], texts[0][0]]])
    with torch.no_grad():
        logits = model(torch.cat([ids, ids.new_tensor([[texts[0][1]]])], 1)).logits
    assert int(after) == int(logits[0, -1].argmax())
