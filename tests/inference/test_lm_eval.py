"""Log-likelihoods are those of the plain model, whatever the batch, the pieces and the windows; lm-eval uses them."""

import json

import exports
import pytest
import torch

from ssmzoo.inference.generate import generate
from ssmzoo.inference.likelihood import log_likelihoods

LM = {"_target_": "ssmzoo.models.mamba.MambaLM", "vocab_size": 290, "d_model": 16, "n_layer": 2}
TOKENS = [name for name in exports.RUNS if exports.is_text(name)]


def plain(model, ids, n):
    """(log-probability of the last n tokens, are they the greedy ones) by one pass over one sequence."""
    with torch.no_grad():
        logprobs = model(torch.tensor([ids[:-1]])).logits[0].double().log_softmax(-1)[-n:]
    targets = torch.tensor(ids[-n:])
    return logprobs.gather(1, targets[:, None]).sum().item(), bool((logprobs.argmax(-1) == targets).all())


@pytest.mark.parametrize("name", TOKENS)
def test_batches_and_pieces_change_nothing(name, tmp_path):
    model = exports.source(name, tmp_path / "run").model
    most = exports.RUNS[name].get("input_size", 29)
    if model(torch.zeros(1, 2, dtype=torch.long)).logits.shape[-1] < most:
        most = 2
    rows = [torch.randint(most, (n,)).tolist() for n in (11, 3, 7)]
    rows[1][-1] = generate(model, [rows[1][:-1]], 1, greedy=True)[0][0] % most
    scored = [10, 1, 4]
    for chunk in (2048, 4, 1):
        for row, n, got in zip(rows, scored, log_likelihoods(model, rows, scored, chunk)):
            total, greedy = plain(model, row, n)
            assert got.total == pytest.approx(total, rel=1e-4) and got.greedy == greedy and len(got.logprobs) == n


def test_counts_that_do_not_fit_are_refused(tmp_path):
    model = exports.source("mamba (text)", tmp_path / "run").model
    for n in (0, 3):
        with pytest.raises(ValueError, match=f"sequence 0 has 3 tokens, of which {n} cannot be scored"):
            log_likelihoods(model, [[1, 2, 3]], [n])


class TestHarness:
    """With lm-eval itself."""

    @pytest.fixture(autouse=True)
    def harness(self, tmp_path):
        pytest.importorskip("lm_eval", reason="lm-eval is not installed (pip install '.[eval]')")
        from ssmzoo.inference import lm_eval

        self.run = exports.write(LM, tmp_path / "run", tokenizer=exports.bpe().to_dict())
        self.module, self.lm = lm_eval, lm_eval.ZooLM(str(self.run), batch_size=2)

    def request(self, kind, *arguments):
        from lm_eval.api.instance import Instance

        return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)

    def test_continuations(self):
        pairs = [("the state space", " model reads"), ("the text ", "token"), ("", "the text"), ("the", " model")]
        got = self.lm.loglikelihood([self.request("loglikelihood", *pair) for pair in pairs], disable_tqdm=True)
        encode = self.lm.text.encode
        for (context, continuation), (total, greedy) in zip(pairs, got):
            whole = encode(context + continuation)
            before = encode(context.rstrip()) if context else []
            ids = whole if before else [self.lm.eot_token_id, *whole]
            expected = plain(self.lm.model, ids, len(whole) - len(before))
            assert total == pytest.approx(expected[0], rel=1e-4) and greedy == expected[1]

    @pytest.mark.parametrize("max_length", [None, 5])
    def test_whole_texts(self, max_length):
        self.lm.max_length = max_length
        text = exports.TEXTS[0]
        (got,) = self.lm.loglikelihood_rolling([self.request("loglikelihood_rolling", text)], disable_tqdm=True)
        ids, end = self.lm.text.encode(text), self.lm.eot_token_id
        if max_length is None:
            expected = plain(self.lm.model, [end, *ids], len(ids))[0]
        else:
            row, expected = [end, *ids], 0.0
            for start in range(0, len(ids), 5):  # predictions start + 1 ... of row, with 5 tokens before the last
                stop = min(start + 5, len(ids))
                expected += plain(self.lm.model, row[stop - min(5, stop) : stop + 1], stop - start)[0]
        assert got == pytest.approx(expected, rel=1e-4)

    def test_generation_ends_at_the_task_s_string(self):
        new = generate(self.lm.model, [self.lm.text.encode("the model")], 12, greedy=True, vocab_size=290)[0]
        full = self.lm.text.decode(new).split("<|endoftext|>")[0]
        options = {"until": [], "max_gen_toks": 12}
        ask = lambda o: self.lm.generate_until([self.request("generate_until", "the model", o)], disable_tqdm=True)[0]  # noqa: E731
        assert ask(options) == full
        stop = full[3:5]
        assert ask(options | {"until": [stop]}) == full[: full.find(stop)]
        with pytest.raises(ValueError, match="num_beams = 2 is not known"):
            ask(options | {"num_beams": 2})

    def test_a_task_made_here(self, tmp_path, call):
        docs = [
            {"q": "the text", "choices": [" token by token", " zzz"], "gold": 0},
            {"q": "and never", "choices": [" qqqq", " looks back"], "gold": 1},
            {"q": "the state", "choices": [" space", " xxxx"], "gold": 0},
        ]
        data = tmp_path / "docs.jsonl"
        data.write_text("\n".join(map(json.dumps, docs)))
        tasks = tmp_path / "tasks"
        tasks.mkdir()
        (tasks / "choice.yaml").write_text(
            "task: zoo_choice\ndataset_path: json\ndataset_kwargs:\n  data_files:\n"
            f"    test: {data}\ntest_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{{{q}}}}'\n"
            "doc_to_choice: '{{choices}}'\ndoc_to_target: gold\ntarget_delimiter: ''\nmetric_list:\n  - metric: acc\n"
        )
        right = 0
        for doc in docs:
            scores = [
                plain(
                    self.lm.model,
                    ids := self.lm.text.encode(doc["q"] + c),
                    len(ids) - len(self.lm.text.encode(doc["q"])),
                )[0]
                for c in doc["choices"]
            ]
            right += scores.index(max(scores)) == doc["gold"]
        status, printed, error = call(
            *("eval", str(self.run), "--lm-eval", "zoo_choice", "--include-path", str(tasks), "--out", "r.json"),
            entry="ssmzoo",
        )
        assert status == 0, error
        assert json.loads((tmp_path / "r.json").read_text())["zoo_choice"]["acc,none"] == pytest.approx(right / 3)
        assert "zoo_choice" in printed

    @pytest.mark.parametrize(
        "arguments, message",
        [
            (("--lm-eval", "helaswag"), "lm-eval has no task 'helaswag'; nearest: "),
            (("--lm-eval", "x", "--limit", "0"), "at least 1"),
        ],
    )
    def test_bad_input(self, arguments, message, call):
        status, _, error = call("eval", str(self.run), *arguments, entry="ssmzoo")
        assert status == 2 and message in error

    def test_a_run_without_text_is_refused(self, call, tmp_path):
        run = exports.run(next(iter(exports.IMAGES)), tmp_path / "image")
        status, _, error = call("eval", str(run), "--lm-eval", "hellaswag", entry="ssmzoo")
        assert status == 2 and "has no tokenizer" in error
