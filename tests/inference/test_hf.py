"""Every language model of the zoo as a model of transformers: the behaviours that transformers tests its Mambas for."""

import copy
import functools
from pathlib import Path
from types import SimpleNamespace

import exports
import pytest
import torch
from torch.nn import functional as F

from ssmzoo._torchvision import make_importable

make_importable()
transformers = pytest.importorskip("transformers")
import ssmzoo.hf  # noqa: E402
from ssmzoo.inference.export import export  # noqa: E402
from ssmzoo.inference.export.source import read_source  # noqa: E402
from ssmzoo.inference.generate import generate  # noqa: E402
from ssmzoo.inference.hf import CACHE  # noqa: E402
from ssmzoo.released.files import CheckpointError  # noqa: E402

AutoModel, AutoTokenizer = transformers.AutoModelForCausalLM, transformers.AutoTokenizer


def reads_tokens(name):
    node = exports.RUNS[name]
    return exports.is_text(name) and any(isinstance(m, torch.nn.Embedding) for m in exports.build_model(node).modules())


NAMES = [name for name in exports.RUNS if reads_tokens(name)]
every = pytest.mark.parametrize("name", NAMES)
KINDS = ["mamba (text)", "moe_mamba (text)", "transformer (text)"]
rest = [pytest.param(name, marks=pytest.mark.slow) for name in NAMES if name not in KINDS]
some = pytest.mark.parametrize("name", KINDS + rest)  # three in every run, all of them in the slow ones


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    @functools.cache
    def get(name):
        run = exports.run(name, tmp_path_factory.mktemp("runs") / "run")
        return run, read_source(run).model, AutoModel.from_pretrained(run).eval()

    return get


def prompts(rows=2, length=7):
    return torch.randint(29, (rows, length), generator=torch.Generator().manual_seed(3))


def new_tokens(model, ids, **options):
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None} | options
    if ids is not None:
        options = {"attention_mask": torch.ones_like(ids)} | options  # else every token 0 would be taken for padding
    return model.generate(ids, **options)


@every
def test_run_folder_saved_folder_and_export_give_our_logits(name, runs, tmp_path):
    run, ours, model = runs(name)
    ids = prompts()
    expected = exports.outputs(ours, ids)
    assert type(model) is ssmzoo.hf.ZooForCausalLM and torch.equal(exports.outputs(model, ids), expected)
    model.save_pretrained(tmp_path / "saved")
    again, info = AutoModel.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not info["unexpected_keys"] and torch.equal(exports.outputs(again.eval(), ids), expected)
    tied = [p for p in model.parameters()], [p for p in again.parameters()]
    assert len(tied[0]) == len(tied[1]) == len(list(ours.parameters()))
    export(run, "hf", tmp_path / "out")
    exported = AutoModel.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(exports.outputs(exported, ids), expected, rtol=1e-4, atol=1e-5)


@every
def test_greedy_text_is_ours_with_cache_without_and_in_chunks(name, runs):
    _, ours, model = runs(name)
    ids = prompts()
    expected = torch.tensor(generate(ours, ids, 6, greedy=True))
    assert torch.equal(new_tokens(model, ids)[:, 7:], expected)
    assert torch.equal(new_tokens(model, ids, use_cache=False)[:, 7:], expected)
    assert torch.equal(new_tokens(model, ids, prefill_chunk_size=3)[:, 7:], expected)


@every
def test_left_padding_changes_nothing(name, runs):
    _, ours, model = runs(name)
    short, long = prompts(1, 4), prompts(1, 9)
    ids = torch.cat([F.pad(short, (5, 0), value=28), long])
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    got = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(got[:1, 5:], model(short).logits, rtol=1e-4, atol=1e-5)
    text = new_tokens(model, ids, attention_mask=mask)
    assert text[0, 9:].tolist() == new_tokens(model, short)[0, 4:].tolist()
    assert text[1, 9:].tolist() == new_tokens(model, long)[0, 9:].tolist()
    chunks = new_tokens(model, ids, attention_mask=mask, prefill_chunk_size=4)
    assert torch.equal(chunks, text)


@every
def test_hidden_states_lead_to_the_logits(name, runs):
    _, _, model = runs(name)
    short = prompts(1, 4)
    ids = torch.cat([F.pad(short, (3, 0), value=28), prompts(1, 7)])
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    output = model(ids, attention_mask=mask, output_hidden_states=True)
    hidden = output.hidden_states
    assert len(hidden) == model.config.num_hidden_layers + 1
    assert {h.shape for h in hidden} == {(2, 7, model.config.hidden_size)}
    torch.testing.assert_close(model.get_output_embeddings()(hidden[-1]), output.logits, rtol=1e-4, atol=1e-5)
    alone = model(short, output_hidden_states=True).hidden_states
    torch.testing.assert_close([h[:1, 3:] for h in hidden], list(alone), rtol=1e-4, atol=1e-5)
    assert model(ids).hidden_states is None


@every
def test_beams_reorder_the_state(name, runs):
    _, _, model = runs(name)
    ids = prompts()
    options = dict(num_beams=3, num_return_sequences=2, return_dict_in_generate=True, output_scores=True)
    with_cache, without = (new_tokens(model, ids, use_cache=use, **options) for use in (True, False))
    assert torch.equal(with_cache.sequences, without.sequences) and len(with_cache.sequences) == 4
    torch.testing.assert_close(with_cache.sequences_scores, without.sequences_scores, rtol=1e-4, atol=1e-5)


@every
def test_a_cache_is_continued_from(name, runs):
    _, _, model = runs(name)
    ids = prompts()
    first = new_tokens(model, ids, max_new_tokens=3, return_dict_in_generate=True)
    assert first.past_key_values.get_seq_length() == 9
    second = new_tokens(model, first.sequences, max_new_tokens=3, past_key_values=first.past_key_values)
    assert torch.equal(second, new_tokens(model, ids))


@some
@torch.no_grad()
def test_a_cache_that_was_copied_goes_its_own_way(name, runs):
    _, ours, model = runs(name)
    ids, cache = prompts(), CACHE
    first = model(ids)
    copied = copy.deepcopy(first[cache])
    told = [model(ids[:, :1], **{cache: first[cache]}).logits, model(ids[:, 1:2], **{cache: first[cache]}).logits]
    expected = ours(torch.cat([ids, ids[:, :2]], 1)).logits[:, -2:]
    torch.testing.assert_close(torch.cat(told, 1), expected, rtol=1e-4, atol=1e-5)
    again = model(ids[:, 2:3], **{cache: copied}).logits
    torch.testing.assert_close(again, ours(torch.cat([ids, ids[:, 2:3]], 1)).logits[:, -1:], rtol=1e-4, atol=1e-5)
    further = copy.deepcopy(copied)
    assert torch.equal(*(model(ids[:, :1], **{cache: c}).logits for c in (copied, further)))


@every
def test_a_training_step_lowers_the_loss(name, runs):
    model, ids = AutoModel.from_pretrained(runs(name)[0]).train(), prompts(4, 12)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(4):
        losses.append(model(input_ids=ids, labels=ids).loss)
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]


@some
def test_the_trainer_of_transformers_trains_it(name, runs, tmp_path):
    run, _, _ = runs(name)
    model = AutoModel.from_pretrained(run)
    rows = [{"input_ids": row, "labels": row} for row in prompts(4, 12)]
    arguments = transformers.TrainingArguments(
        tmp_path, max_steps=3, per_device_train_batch_size=4, learning_rate=1e-2, report_to=[], save_strategy="no"
    )
    arguments.disable_tqdm = True
    trainer = transformers.Trainer(model, arguments, train_dataset=rows)
    before = trainer.evaluate(rows)["eval_loss"]
    trainer.train()
    assert trainer.evaluate(rows)["eval_loss"] < before


@some
def test_sampling_follows_the_seed(name, runs):
    _, _, model = runs(name)
    for beams in (1, 2):
        texts, options = [], dict(max_new_tokens=12, do_sample=True, top_k=20, temperature=1.5, num_beams=beams)
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            texts.append(new_tokens(model, prompts(), **options))
        assert torch.equal(texts[0], texts[1]) and not torch.equal(texts[0], texts[2])


@some
def test_loss_is_cross_entropy_and_what_the_model_adds(name, runs):
    _, ours, model = runs(name)
    ids, labels = prompts(), prompts().clone()
    labels[0, :3] = -100
    logits, _, aux = ours(ids)
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    expected = expected + sum(v for k, v in aux.items() if k.endswith("_loss"))
    output = model(ids, labels=labels)
    torch.testing.assert_close(output.loss, expected)
    assert torch.equal(model(ids, labels=labels, return_dict=False)[0], output.loss)
    last = model(ids, logits_to_keep=2).logits
    torch.testing.assert_close(last, output.logits[:, -2:], rtol=1e-4, atol=1e-5)
    picked = model(ids, logits_to_keep=torch.tensor([1, 4])).logits
    torch.testing.assert_close(picked, output.logits[:, [1, 4]], rtol=1e-4, atol=1e-5)


@some
def test_embeddings_may_be_given_instead_of_ids(name, runs):
    _, _, model = runs(name)
    ids = prompts()
    vectors = model.get_input_embeddings()(ids)
    torch.testing.assert_close(model(inputs_embeds=vectors).logits, model(ids).logits)
    text = new_tokens(model, None, inputs_embeds=vectors)
    assert torch.equal(text, new_tokens(model, ids)[:, 7:])


@some
def test_lora_by_module_names(name, runs, tmp_path):
    peft = pytest.importorskip("peft")
    run, _, plain = runs(name)
    model = AutoModel.from_pretrained(run)
    target = "input_projection" if "transformer" in name else "in_proj"
    leaves = {n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    others = {n.rpartition(".")[2] for n, m in model.named_modules() if not isinstance(m, torch.nn.Linear)}
    target = target if target in leaves - others else sorted(leaves - others)[0]
    config = peft.LoraConfig(target_modules=[target], r=2, init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, config).eval()
    ids = prompts()
    changed = adapted(ids).logits
    assert (changed - plain(ids).logits).norm() > 1e-5
    cached, uncached = new_tokens(adapted, ids), new_tokens(adapted, ids, use_cache=False)
    assert torch.equal(cached, uncached)
    adapted.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(AutoModel.from_pretrained(run), tmp_path).eval()
    torch.testing.assert_close(again(ids).logits, changed)
    torch.testing.assert_close(exports.outputs(adapted.merge_and_unload(), ids), changed, rtol=1e-4, atol=1e-5)


@some
def test_gradients_are_the_same_when_activations_are_recomputed(name, runs):
    run, _, _ = runs(name)
    gradients = []
    for recompute in (False, True):
        model = AutoModel.from_pretrained(run).train()
        assert not model.is_activation_checkpointing
        if recompute:
            model.gradient_checkpointing_enable()
            assert model.is_activation_checkpointing
        torch.manual_seed(0)  # noise of routers and dropout
        model(prompts(), labels=prompts()).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*gradients)


@some
def test_vocabulary_may_grow(name, runs, tmp_path):
    run, _, plain = runs(name)
    model = AutoModel.from_pretrained(run).eval()
    model.resize_token_embeddings(35, mean_resizing=False)
    assert model(prompts()).logits.shape[-1] == 35
    torch.testing.assert_close(model(prompts()).logits[..., :29], plain(prompts()).logits[..., :29])
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(prompts()).logits, model(prompts()).logits)


def test_a_head_may_be_untied(tmp_path):
    node = {"_target_": "ssmzoo.models.mamba.MambaLM", "vocab_size": 29, "d_model": 16, "n_layer": 1}
    tied = ssmzoo.hf.ZooForCausalLM(ssmzoo.hf.ZooConfig(target=node.pop("_target_"), arguments=node))
    assert tied.config.tie_word_embeddings and tied.model.lm_head.weight is tied.model.backbone.embedding.weight
    untied = ssmzoo.hf.ZooForCausalLM(ssmzoo.hf.ZooConfig(**tied.config.to_dict() | {"tie_word_embeddings": False}))
    untied.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert (
        not again.config.tie_word_embeddings and again.model.lm_head.weight is not again.model.backbone.embedding.weight
    )
    assert torch.equal(again.model.lm_head.weight, untied.model.lm_head.weight)


@some
def test_pipeline_writes_on(name, runs):
    from tokenizers import Tokenizer, models, pre_tokenizers

    _, _, model = runs(name)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(29)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, padding_side="left", pad_token="w28")
    pipe = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
    texts = ["w1 w2 w3 w4 w5", "w7 w8"]
    options = dict(max_new_tokens=4, do_sample=False, return_full_text=False, eos_token_id=None, use_cache=True)
    batched = [rows[0]["generated_text"] for rows in pipe(texts, batch_size=2, **options)]
    assert batched == [pipe(text, **options)[0]["generated_text"] for text in texts]


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_tokenizer_travels_and_pipeline_runs(kind, tmp_path):
    tokenizer = exports.bpe() if kind == "bpe" else ssmzoo_bytes()
    node = {"_target_": "ssmzoo.models.mamba.MambaLM", "vocab_size": tokenizer.vocab_size, "d_model": 16, "n_layer": 1}
    run = exports.write(node, tmp_path / "run", tokenizer=tokenizer.to_dict())
    export(run, "hf", tmp_path / "out")
    for folder in (run, tmp_path / "out"):
        theirs = AutoTokenizer.from_pretrained(folder)
        for text in (
            "the state, read token by token",
            " Zürich \u00ff \u0100\n\t日本 ",
            "<pad>" if kind == "bpe" else "",
        ):
            assert theirs(text)["input_ids"] == tokenizer.encode(text)
            assert theirs.decode(tokenizer.encode(text)) == text
        batch = theirs(["the", "the model reads"], padding=True, return_tensors="pt")
        assert batch["attention_mask"][0, 0] == 0 and batch["attention_mask"][0, -1] == 1
        model = AutoModel.from_pretrained(folder)
        pipe = transformers.pipeline("text-generation", model=model, tokenizer=theirs)
        assert pipe("the model", max_new_tokens=4, do_sample=False)[0]["generated_text"].startswith("the model")
        torch.manual_seed(0)
        drawn = model.generate(**batch, max_new_tokens=40, do_sample=True, temperature=50.0)
        assert drawn.max() < tokenizer.vocab_size


def ssmzoo_bytes():
    from ssmzoo.data.text_tokenizer import ByteTokenizer

    return ByteTokenizer()


def test_push_to_hub_prepares_the_same_folder(runs, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    _, _, model = runs(KINDS[0])
    seen = []

    def upload(self, folder, *args, **kwargs):
        seen.extend(path.name for path in Path(folder).iterdir())

    monkeypatch.setattr(hub.HfApi, "create_repo", lambda self, name, **kwargs: SimpleNamespace(repo_id=name))
    monkeypatch.setattr(transformers.PreTrainedModel, "_upload_modified_files", upload)
    model.push_to_hub("me/model")
    assert {"config.json", "model.safetensors"} <= set(seen)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda m: m(), "exactly one of input_ids and inputs_embeds"),
        (lambda m: m(prompts(), output_attentions=True), "attentions are not returned"),
        (lambda m: m.gradient_checkpointing_enable({"use_reentrant": True}), "got {'use_reentrant': True}"),
        (lambda m: m.activation_checkpointing_enable(every_n_layers=2), "got {'every_n_layers': 2}"),
        (
            lambda m: m(prompts(), past_key_values=transformers.DynamicCache()),
            "(past_key_values|cache) is a DynamicCache",
        ),
        (lambda m: m(prompts(), attention_mask=torch.ones(2, 3)), r"attention_mask has shape \(2, 3\)"),
        (lambda m: new_tokens(m, prompts(), cache_implementation="static"), "one form only; leave it out"),
        (lambda m: new_tokens(m, prompts(1), prompt_lookup_num_tokens=2), "not supported with stateful models"),
        (lambda m: m(prompts()).past_key_values.crop(-1), "cannot be cropped"),
    ],
)
def test_what_cannot_be_done_is_said(call, message, runs):
    with pytest.raises(ValueError, match=message):
        call(runs(KINDS[0])[2])


def test_missing_weights_are_no_model(runs, tmp_path):
    _, _, model = runs(KINDS[0])
    state = {k: v for k, v in model.state_dict().items() if "A_log" not in k}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(CheckpointError, match="does not hold all weights of ssmzoo.models.mamba.MambaLM: .*A_log"):
        AutoModel.from_pretrained(tmp_path)


def test_other_models_are_refused(tmp_path):
    run = exports.run(next(iter(exports.IMAGES)), tmp_path / "run")
    with pytest.raises(CheckpointError, match="no language model"):
        AutoModel.from_pretrained(run)
    with pytest.raises(CheckpointError, match="no tokenizer"):
        AutoTokenizer.from_pretrained(run)
