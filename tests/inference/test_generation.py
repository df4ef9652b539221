"""Generation: carried state equals recomputation, sampling rules have known answers, the command shows the text."""

import math
import types

import pytest
import torch
from torch import nn

from ssmzoo.cli import generate as command
from ssmzoo.data.text_tokenizer import from_dict, train_bpe
from ssmzoo.inference.generate import FINISHED, Sampling, generate, pad_left, prefill, stream
from ssmzoo.inference.subject import Subject
from ssmzoo.layers.state import ModelOutput
from ssmzoo.models.baselines import TransformerLM
from ssmzoo.models.mamba import MambaLM
from ssmzoo.models.moe_mamba import MoEMambaLM
from ssmzoo.train.checkpoint import write_checkpoint
from ssmzoo.zoo import create_model

PROMPTS = [[5, 3, 8, 1, 1, 9, 20, 4], [7], [2, 2, 6, 11, 30]]


class Counter(nn.Module):
    """Predicts last token + 1 (mod v) with certainty, and remembers in its state how many real tokens it has seen."""

    def __init__(self, v: int = 16):
        super().__init__()
        self.v, self.lengths = v, []

    def forward(self, input_ids, state=None, *, mask=None, seq_idx=None):
        self.lengths.append(input_ids.shape[1])
        real = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask
        state = (state if state is not None else torch.zeros(len(input_ids), dtype=torch.long)) + real.sum(1)
        logits = 50.0 * nn.functional.one_hot((input_ids + 1) % self.v, self.v).float()
        return ModelOutput(logits, state, {})


def build(name):
    torch.manual_seed(0)
    model = {
        "mamba": lambda: MambaLM(32, 16, 2),
        "transformer": lambda: TransformerLM(32, 16, 2, 2),
        "moe_mamba": lambda: MoEMambaLM(32, 16, 2, n_experts=4),
    }[name]()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))  # initial weights predict too uniformly to tell mistakes
    return model.eval()


@pytest.fixture(params=["mamba", "transformer", "moe_mamba"])
def model(request):
    return build(request.param)


@torch.no_grad()
def recomputed(model, prompt, n):
    """Greedy continuation that reads everything again for each token."""
    ids = list(prompt)
    for _ in range(n):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


# ---------------------------------------------------------------- the state


def test_carried_state_equals_recomputation_for_a_batch_of_unequal_prompts(model):
    assert generate(model, PROMPTS, 12, greedy=True) == [recomputed(model, prompt, 12) for prompt in PROMPTS]


@pytest.mark.parametrize("chunk", [1, 3, 8, 100])
def test_chunked_prefill_gives_the_same_logits(model, chunk):
    ids, mask = pad_left(PROMPTS)
    whole, _ = prefill(model, ids, mask=mask)
    torch.testing.assert_close(prefill(model, ids, mask=mask, chunk=chunk)[0], whole, rtol=1e-4, atol=1e-5)
    assert generate(model, PROMPTS, 6, greedy=True, prefill_chunk=chunk) == generate(model, PROMPTS, 6, greedy=True)


@pytest.mark.parametrize("name", ["transformer", "gated_ssm", "hawk"])
def test_prompts_of_unequal_lengths_are_read_in_both_directions(name):
    sizes = {"d_model": 16, "n_blocks": 2, "n_heads": 2} if name == "transformer" else {"d_model": 16, "d_state": 8}
    torch.manual_seed(0)
    model = create_model(name, vocab_size=32, **sizes).eval()
    input_ids, mask = pad_left(PROMPTS)
    logits, state = prefill(model, input_ids, mask=mask, bidirectional=True)
    for i, prompt in enumerate(PROMPTS):
        alone = model(torch.tensor([prompt]), prefix=len(prompt))
        torch.testing.assert_close(logits[i], alone.logits[0, -1])
        after = model(torch.tensor([[3]]), alone.state).logits
        torch.testing.assert_close(model(torch.tensor([[3]] * 3), state).logits[i], after[0])
    with pytest.raises(ValueError, match="prefill_chunk = 2: a prompt that is read in both directions is read whole"):
        generate(model, PROMPTS, 2, prefill_chunk=2, bidirectional=True)
    with pytest.raises(ValueError, match="reads in one direction only"):
        generate(MambaLM(32, 16, 1), PROMPTS, 2, bidirectional=True)


def test_every_step_reads_one_token_and_the_state_does_not_grow():
    counter = Counter()
    assert generate(counter, [[1, 2, 3, 4]], 5, greedy=True) == [[5, 6, 7, 8, 9]]
    assert counter.lengths == [4, 1, 1, 1, 1]
    model, sizes = build("mamba"), []
    state = prefill(model, torch.tensor([PROMPTS[0]]))[1]
    for _ in range(3):
        sizes.append([t.shape for layer in state for t in layer])
        state = prefill(model, torch.tensor([[1]]), state)[1]
    assert sizes[0] == sizes[1] == sizes[2]


def test_streaming_is_lazy_and_leaves_the_model_as_it_was():
    counter = nn.Sequential(Counter())[0].train()
    steps = stream(counter, [[1]], 1000, greedy=True)
    assert counter.lengths == []
    assert [next(steps).tolist() for _ in range(3)] == [[2], [3], [4]] and not counter.training
    steps.close()
    assert counter.training and len(counter.lengths) <= 3


def test_stop_tokens_end_each_sequence_by_itself():
    found = [tokens.tolist() for tokens in stream(Counter(), [[1], [5], [12]], 9, greedy=True, stop_tokens={4, 8})]
    assert found == [
        [2, 6, 13],
        [3, 7, 14],
        [FINISHED, FINISHED, 15],
        [FINISHED, FINISHED, 0],
        [FINISHED, FINISHED, 1],
        [FINISHED, FINISHED, 2],
        [FINISHED, FINISHED, 3],
    ]
    assert generate(Counter(), [[1], [5]], 9, greedy=True, stop_tokens=[4, 6]) == [[2, 3], []]


def test_finished_sequences_do_not_disturb_the_others(model):
    alone = generate(model, [PROMPTS[0]], 10, greedy=True)[0]
    others = [[i, i] for i in range(32)]
    continued = generate(model, others, 10, greedy=True)
    other, stop, position = next(
        (prompt, token, text.index(token))
        for prompt, text in zip(others, continued)
        for token in text[:5]
        if token not in alone
    )
    both = generate(model, [PROMPTS[0], other], 10, greedy=True, stop_tokens=[stop])
    assert both[0] == alone and len(both[1]) == position


# ---------------------------------------------------------------- sampling


def test_seed_decides_the_draws_and_the_global_generator_is_left_alone(model):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = generate(model, PROMPTS, 20, seed=3)
    assert torch.equal(before, torch.get_rng_state())
    assert generate(model, PROMPTS, 20, seed=3) == first != generate(model, PROMPTS, 20, seed=4)
    assert generate(model, PROMPTS, 20) != generate(model, PROMPTS, 20)


def test_draws_follow_the_distribution():
    logits = torch.tensor([[0.5, 0.3, 0.2]]).log().expand(20_000, 3)
    tokens = Sampling(temperature=0.5, seed=0).draw(logits, None, torch.Generator().manual_seed(0))
    share = torch.bincount(tokens, minlength=3) / len(tokens)
    expected = torch.tensor([0.25, 0.09, 0.04]) / 0.38
    assert (share - expected).abs().max() < 4 * 0.5 / 20_000**0.5  # four standard errors of a share


LOGITS = torch.tensor([[0.1, 0.4, 0.05, 0.3, 0.15], [0.2, 0.2, 0.2, 0.2, 0.2]]).log()


@pytest.mark.parametrize(
    "options, kept",
    [
        ({}, [{0, 1, 2, 3, 4}, {0, 1, 2, 3, 4}]),
        ({"top_k": 2}, [{1, 3}, {0, 1, 2, 3, 4}]),  # equally likely tokens are not distinguished
        ({"top_p": 0.69}, [{1, 3}, 4]),
        ({"top_p": 0.71}, [{1, 3, 4}, 4]),
        ({"top_p": 1e-6}, [{1}, 1]),
        ({"top_p": 1.0}, [{0, 1, 2, 3, 4}, {0, 1, 2, 3, 4}]),
        ({"min_p": 0.5}, [{1, 3}, {0, 1, 2, 3, 4}]),
        ({"min_p": 1.0}, [{1}, {0, 1, 2, 3, 4}]),
        ({"top_k": 4, "top_p": 0.5, "temperature": 2.0}, [{1, 3}, 3]),
    ],
)
def test_filters_keep_the_tokens_their_definitions_name(options, kept):
    filtered = Sampling(**options).filter(LOGITS)
    for row, expected in zip(filtered, kept):
        found = {i for i, logit in enumerate(row.tolist()) if logit > -math.inf}
        assert len(found) == expected if isinstance(expected, int) else found == expected


def test_repetition_penalty_lowers_what_was_seen_in_prompt_and_text():
    logits = torch.tensor([[2.0, -2.0, 1.0]])
    seen = torch.tensor([[True, True, False]])
    assert Sampling(repetition_penalty=2.0, greedy=True).filter(logits, seen).tolist() == [[1.0, -4.0, 1.0]]
    assert generate(Counter(4), [[0]], 6, greedy=True) == [[1, 2, 3, 0, 1, 2]]
    shy = generate(Counter(4), [[3, 0], [0, 1]], 2, greedy=True, repetition_penalty=1e9)
    assert shy == [[1, 2], [2, 3]]
    left_padded = generate(Counter(4), [[0, 1], [3]], 1, greedy=True, repetition_penalty=1e9)
    assert left_padded == [[2], [0]]  # the padding's id 0 does not count as seen


def test_temperature_zero_is_greedy_and_a_wider_head_is_cut():
    assert generate(Counter(), [[1]], 3, temperature=0) == [[2, 3, 4]]
    assert all(token < 3 for token in generate(Counter(), [[1]], 50, vocab_size=3, seed=0)[0])


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "options, message",
    [
        ({"temperature": -1}, "temperature = -1; it must be 0"),
        ({"temperature": math.nan}, "temperature = nan"),
        ({"top_p": 1.2}, "top_p = 1.2; it must be above 0 and at most 1"),
        ({"top_p": 0}, "top_p = 0"),
        ({"top_k": 0}, "top_k = 0; it must be at least 1"),
        ({"top_k": 17}, "top_k = 17 exceeds the vocabulary of 16"),
        ({"min_p": -0.1}, "min_p = -0.1"),
        ({"repetition_penalty": 0}, "repetition_penalty = 0"),
        ({"prefill_chunk": 0}, "prefill_chunk = 0"),
        ({"vocab_size": 0}, "vocab_size = 0"),
        ({"max_new_tokens": -3}, "max_new_tokens = -3"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        generate(Counter(), [[1]], **options)


@pytest.mark.parametrize(
    "prompts, message",
    [
        ([], "no prompt is given"),
        ([[1], []], "prompt 1 is empty"),
        ([[0.5]], "expected token ids"),
        (torch.zeros(2, 3, 4, dtype=torch.long), "expected token ids"),
    ],
)
def test_bad_prompts_are_named(prompts, message):
    with pytest.raises(ValueError, match=message):
        generate(Counter(), prompts)


def test_unknown_options_and_nan_logits_are_refused():
    with pytest.raises(TypeError, match="temprature"):
        generate(Counter(), [[1]], temprature=1)
    broken = build("mamba")
    next(broken.parameters()).data.fill_(math.nan)
    with pytest.raises(ValueError, match="logits are NaN"):
        generate(broken, [[1]])


# ---------------------------------------------------------------- ssmzoo generate


@pytest.fixture
def checkpoint(tmp_path):
    def write(tokenizer, vocab_size=256):
        model = MambaLM(vocab_size, 8, 1)
        node = {"_target_": "ssmzoo.models.mamba.MambaLM", "vocab_size": vocab_size, "d_model": 8, "n_layer": 1}
        manifest = {"model": "mamba", "config": {"model": node}} | ({"tokenizer": tokenizer} if tokenizer else {})
        return str(write_checkpoint(tmp_path / "checkpoint", model.state_dict(), manifest))

    return write


def run(capsys, *arguments):
    import argparse

    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    assert command.run(parser.parse_args(["generate", *arguments])) == 0
    return capsys.readouterr().out


def test_command_streams_text_from_bytes(checkpoint, capsys):
    path = checkpoint({"type": "bytes"})
    out = run(capsys, path, "--prompt", "grüße ", "--max-new-tokens", "20", "--seed", "1", "--prefill-chunk", "2")
    assert out.startswith("grüße ") and len(out) > 10 and out.endswith("\n")
    assert out == run(capsys, path, "--prompt", "grüße ", "--max-new-tokens", "20", "--seed", "1")
    several = run(capsys, path, "--prompt", "a", "--prompt", "bcd", "--max-new-tokens", "5", "--greedy")
    assert "--- prompt 1 ---\na" in several and "--- prompt 2 ---\nbcd" in several


def test_command_reads_a_learnt_vocabulary(checkpoint, capsys):
    tokenizer = train_bpe(["the cat and the hat and the bat"] * 3, 262)
    path = checkpoint(tokenizer.to_dict(), tokenizer.vocab_size)  # the model's head is wider: a multiple of 8
    assert run(capsys, path, "--prompt", "the cat", "--max-new-tokens", "8", "--top-p", "0.9").startswith("the cat")


@pytest.mark.parametrize(
    "tokenizer, arguments, message",
    [
        (None, ["--prompt", "a"], "without a tokenizer"),
        ({"type": "bytes"}, ["--prompt", ""], "--prompt '' has no token"),
        ({"type": "bytes"}, ["--prompt", "a", "--stop", ""], "--stop is empty"),
        ({"type": "bytes"}, ["--prompt", "a", "--top-k", "999"], "top_k = 999 exceeds the vocabulary of 256"),
        ({"type": "bytes"}, ["--prompt", "a", "--device", "nonsense"], "--device nonsense is not usable"),
    ],
)
def test_command_explains_bad_input(checkpoint, capsys, tokenizer, arguments, message):
    with pytest.raises(ValueError, match=message):
        run(capsys, checkpoint(tokenizer), *arguments)


@pytest.mark.parametrize(
    "stops, written",
    [
        (["f"], "abcde"),
        (["fgh"], "abcde"),
        (["efx", "ghi"], "abcdef"),
        (["xyz"], "abcdefghijk"),
        (["k\\n", "jz"], "abcdefghijk"),
        (["hi", "cde"], "ab"),
    ],
)
def test_command_stops_and_shows_text_as_it_is_drawn(checkpoint, monkeypatch, stops, written):
    shown = []
    subject = Subject("x", Counter(256), tokenizer=from_dict({"type": "bytes"}))
    monkeypatch.setattr("ssmzoo.inference.subject.load_subject", lambda path: subject)
    monkeypatch.setattr(command, "_Out", lambda: types.SimpleNamespace(write=shown.append))
    arguments = dict(
        checkpoint="x",
        prompt=["a"],
        max_new_tokens=10,
        temperature=1.0,
        greedy=True,
        top_k=None,
        top_p=None,
        min_p=None,
        repetition_penalty=1.0,
        seed=None,
        stop=stops,
        ignore_eos=False,
        prefill_chunk=None,
        read_twice=False,
        bidirectional=None,
        device="cpu",
    )
    command.run(types.SimpleNamespace(**arguments))
    assert "".join(shown) == written + "\n"
    assert shown[:2] == ["a", "b"]  # at once, not at the end


@pytest.mark.parametrize("ignore", [False, True])
def test_command_stops_at_the_end_token_that_documents_had(checkpoint, monkeypatch, ignore, capsys):
    tokenizer = train_bpe(["ab cd"] * 3, 262, "<|endoftext|>")
    assert tokenizer.end_token == 0
    after = tokenizer.encode("z")[0]
    subject = Subject("x", Counter(tokenizer.vocab_size), tokenizer=tokenizer.ending(after + 2))
    monkeypatch.setattr("ssmzoo.inference.subject.load_subject", lambda path: subject)
    out = run(capsys, "x", "--prompt", "z", "--greedy", "--max-new-tokens", "6", *(["--ignore-eos"] if ignore else []))
    assert out.startswith("z{|}~") if ignore else out == "z{\n"
