"""SSMI's memories in frozen models: identity, gradients, causality, pictures, decoding, padding, share, files."""

import copy
import json

import pytest
import torch
from torch import nn

import ssmzoo
from ssmzoo.adapt.ssmi import add_ssmi, fingerprint, load_adapter, save_adapter
from ssmzoo.models.ssmi import Memory, VisualDecoder

V, D = 20, 16  # vocabulary, width
SIZES = {"vocab_size": V, "hidden_size": D, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=1))


def gpt_neox(parallel=True):
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    return GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES, use_parallel_residual=parallel))


def bert():
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(BertConfig(**SIZES))


BACKBONES = {
    "llama": llama,
    "gpt_neox": gpt_neox,
    "gpt_neox in series": lambda: gpt_neox(False),
    "bert": bert,
    "transformer": lambda: ssmzoo.create_model("transformer", vocab_size=V, d_model=D, n_blocks=2, n_heads=2),
    "mamba": lambda: ssmzoo.create_model("mamba", vocab_size=V, d_model=D, n_layer=2),
    "mamba with an MLP": lambda: ssmzoo.create_model("mamba", vocab_size=V, d_model=D, n_layer=2, d_intermediate=24),
}
CAUSAL = [name for name in BACKBONES if name != "bert"]


def made(name, **options):
    if name in ("llama", "bert") or "neox" in name:
        pytest.importorskip("transformers", reason="its layers are those of transformers: pip install transformers")
    torch.manual_seed(0)
    frozen = BACKBONES[name]().eval()
    return frozen, add_ssmi(copy.deepcopy(frozen), 5, **{"rank": 4, "d_state": 3} | options)


def opened(adapted):
    """After a first update, which leaves W_up no longer 0."""
    for memory in adapted.memories:
        nn.init.normal_(memory.up.weight, std=0.5)
    return adapted


def inputs(rows=2, length=7):
    torch.manual_seed(1)
    return torch.randint(1, V, (rows, length)), torch.randn(rows, 3, 5)


@pytest.mark.parametrize("name", BACKBONES)
def test_the_start_is_the_frozen_model_and_only_memories_learn(name):
    frozen, adapted = made(name)
    ids, visual = inputs()
    assert torch.equal(adapted(ids, visual=visual).logits, frozen(ids).logits)
    assert fingerprint(adapted.backbone) == fingerprint(frozen)
    total = sum(p.numel() for p in adapted.parameters())
    assert adapted.trainable() == (sum(p.numel() for p in adapted.parameters() if p.requires_grad), total)
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=1.0)
    for _step in range(2):
        optimizer.zero_grad()
        adapted.train()(ids, visual=visual).logits.square().mean().backward()
        got = {n for n, p in adapted.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
        assert all(n.startswith("memories.") for n in got)
        optimizer.step()
    assert not adapted.backbone.training and adapted.memories.training
    assert got == {n for n, _ in adapted.named_parameters() if n.startswith("memories.")}, "after one update, all"


@pytest.mark.parametrize("name", BACKBONES)
def test_pictures_are_seen_and_later_tokens_are_not(name):
    ids, visual = inputs()
    changed = ids.clone()
    changed[:, 4] = (ids[:, 4] + 1) % V
    ways = [(i, s) for i in ("prefix", "add", "none") for s in (True, False)]  # the memory's, whatever it stands in
    for inject, selective in ways if name == "transformer" else ways[:1]:
        adapted = opened(made(name, inject=inject, selective=selective)[1])
        with torch.no_grad():
            logits, other = (adapted(ids, visual=x).logits for x in (visual, visual + 1.3 * visual.flip(1)))
            assert torch.equal(logits, other) == (inject == "none"), (inject, selective)
            if name != "bert":
                later = adapted(changed, visual=visual).logits
                assert torch.allclose(logits[:, :4], later[:, :4], atol=1e-6)
                assert not torch.allclose(logits[:, 4:], later[:, 4:], atol=1e-4)


@pytest.mark.parametrize(
    "name, inject, selective",
    [*((n, "prefix", True) for n in CAUSAL), ("transformer", "prefix", False), ("transformer", "add", True)],
)
def test_carried_state_gives_what_one_pass_gives(name, inject, selective):
    adapted = opened(made(name, inject=inject, selective=selective)[1]).eval()
    ids, visual = inputs()
    with torch.no_grad():
        whole = adapted(ids, visual=visual).logits
        for pieces in ([1] * 7, [3, 4], [4, 1, 2]):
            state, parts, start = None, [], 0
            for size in pieces:
                seen = {} if start else {"visual": visual}
                logits, after, _ = adapted(ids[:, start : start + size], state, **seen)
                if len(pieces) == 3:
                    again = adapted(ids[:, start : start + size], state, **seen).logits
                    assert torch.equal(logits, again), "a state is not changed by the call that it is given to"
                parts.append(logits)
                state, start = after, start + size
            assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-5)


@pytest.mark.parametrize("name", BACKBONES)
def test_padding_is_not_read(name):
    adapted = opened(made(name)[1]).eval()
    ids, visual = inputs()
    with torch.no_grad():
        whole = adapted(ids, visual=visual).logits
        for left in (0, 2):
            mask = torch.zeros(2, 10, dtype=torch.bool)
            mask[:, left : left + 7] = True
            padded = torch.zeros(2, 10, dtype=torch.long).masked_scatter(mask, ids)
            logits, state, _ = adapted(padded, visual=visual, mask=mask)
            if name != "bert" or not left:  # whose positions count what stands on the left
                assert torch.allclose(logits[mask], whole.flatten(0, 1), atol=1e-5)
            if name != "bert" and left:
                longer = adapted(torch.cat([ids, ids[:, :1]], 1), visual=visual).logits[:, -1]
                end = adapted(padded[:, :9], visual=visual, mask=mask[:, :9])
                assert torch.allclose(adapted(ids[:, :1], end.state).logits[:, 0], longer, atol=1e-5)


@pytest.mark.parametrize(
    "options", [{}, {"selective": False}, {"inject": "add"}, {"inject": "none"}], ids=["", "constant", "add", "none"]
)
def test_a_class_that_only_the_picture_holds_is_learnt_through_a_random_frozen_transformer(options):
    """Copy the class of the first of three visual tokens: without pictures no better than 1 in 4."""
    torch.manual_seed(0)
    backbone = ssmzoo.create_model("transformer", vocab_size=8, d_model=32, n_blocks=2, n_heads=2)
    adapted = add_ssmi(backbone, 4, rank=8, d_state=4, **options)
    optimizer = torch.optim.Adam(adapted.memories.parameters(), lr=1e-2)
    for _ in range(80):
        classes = torch.randint(4, (32,))
        visual = torch.cat([nn.functional.one_hot(classes, 4)[:, None], torch.zeros(32, 2, 4)], 1) * 2.0 - 1
        logits = adapted(torch.tensor([[5, 6]]).expand(32, -1), visual=visual).logits[:, -1]
        loss = nn.functional.cross_entropy(logits, classes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    right = (logits.argmax(-1) == classes).float().mean()
    assert right < 0.6 if options.get("inject") == "none" else right > 0.95


def test_parameters_are_the_cards():
    """25.7 million for 32 layers of width 4096 (norms and gammas beside), 0.37 % of 7 billion."""
    with torch.device("meta"):
        memory = Memory(4096, 4096, rank=64)
    beside = sum(p.numel() for n, p in memory.named_parameters() if "norm" in n or n == "gamma")
    assert sum(p.numel() for p in memory.parameters()) - beside == 3 * 4096 * 64 + 16_320
    assert Memory(8, 4, rank=3, gamma="channel").gamma.shape == (8,)


def test_layers_share_bound_and_what_is_refused():
    frozen, adapted = made("transformer", layers="last_1")
    assert len(adapted.memories) == 1 and adapted.chosen == [1]
    assert made("transformer", layers="every_2")[1].chosen == [1] and made("transformer", layers=[0])[1].chosen == [0]
    shared = opened(made("transformer", share=True)[1])
    assert len(shared.memories) == 1 and shared.at[0] is shared.at[1]
    ids, visual = inputs()
    assert adapted(ids, visual=visual).state[0]._fields and "memory" in adapted(ids, visual=visual).state[1]
    for words, options in (
        ("layers is 'first_2'; expected all, every_k or last_k with k in 1..2", {"layers": "first_2"}),
        (r"different numbers in\s+0..1", {"layers": [0, 7]}),
        ("inject is 'prefx'; nearest: prefix", {"inject": "prefx"}),
        ("gamma is 'vector'.*scalar, channel", {"gamma": "vector"}),
        ("rank=0", {"rank": 0}),
        (r"would be trained, more than max_share=0.01: lower rank", {"max_share": 0.01}),
    ):
        model = copy.deepcopy(frozen)
        with pytest.raises(ValueError, match=words):
            add_ssmi(model, 5, **{"rank": 4, "d_state": 3} | options)
        assert all(p.requires_grad for p in model.parameters()) and torch.equal(model(ids).logits, frozen(ids).logits)
    with pytest.raises(ValueError, match="has memories in its layers already"):
        add_ssmi(adapted.backbone, 5)
    for given, words in (
        ({"visual": torch.zeros(2, 3, 4)}, r"visual has shape \(2, 3, 4\); expected \(batch, tokens, 5\)"),
        ({"visual": torch.zeros(1, 3, 5)}, "visual has 1 rows, input_ids 2"),
        ({"visual": visual, "state": adapted(ids).state}, "visual belongs into the first call"),
    ):
        with pytest.raises(ValueError, match=words):
            adapted(ids, **given)


@pytest.mark.parametrize("kind", ["gpt2", "ours in parallel", "no layers"])
def test_layers_that_are_not_known_are_named_in_one_line(kind):
    if kind == "gpt2":
        from transformers import GPT2Config, GPT2LMHeadModel

        model = GPT2LMHeadModel(GPT2Config(vocab_size=V, n_embd=D, n_layer=1, n_head=2))
    elif kind == "no layers":
        model = nn.Sequential(nn.Linear(3, 3))
    else:
        model = ssmzoo.create_model(
            "moe_mamba", vocab_size=V, d_model=D, n_blocks=1, n_experts=2, arrangement="parallel"
        )
    with pytest.raises(
        ValueError, match=r"SSMI does not know the layers of \w+: it has .*known are .*LLaMA .*BERT"
    ) as e:
        add_ssmi(model, 5)
    assert "\n" not in str(e.value) and len(str(e.value)) < 600
    assert kind != "gpt2" or "GPT2Block (attn, ln_1, ln_2, mlp)" in str(e.value)


@pytest.mark.parametrize("name", ["llama", "mamba"])
def test_a_file_holds_the_memories_alone_and_knows_its_backbone(name, tmp_path):
    frozen, adapted = made(name, selective=False, layers=[1])
    opened(adapted)
    folder = save_adapter(adapted, tmp_path / "adapter")
    held = sum(f.stat().st_size for f in folder.iterdir())
    assert held < 4 * sum(p.numel() for p in adapted.memories.parameters()) + 3000
    ids, visual = inputs()
    again = load_adapter(copy.deepcopy(frozen), folder)
    assert torch.equal(again(ids, visual=visual).logits, adapted(ids, visual=visual).logits)
    with pytest.raises(FileExistsError, match="never written over"):
        save_adapter(adapted, folder)
    other = copy.deepcopy(frozen)
    next(other.parameters()).data[0, 0] += 1e-3
    with pytest.raises(ValueError, match="was trained in another model: a .* with fingerprint"):
        load_adapter(other, folder)
    card = json.loads((folder / "adapter.json").read_text())
    for change, words in (({"format": 9}, "format 9"), ({"backbone": 3}, "no whole adapter"),
                          ({"options": {"rnk": 1}}, "does not fit")):  # fmt: skip
        (folder / "adapter.json").write_text(json.dumps(card | change))
        with pytest.raises(ValueError, match=words):
            load_adapter(copy.deepcopy(frozen), folder)
    (folder / "adapter.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match="no whole adapter"):
        load_adapter(copy.deepcopy(frozen), folder)


def test_half_precision_keeps_the_memories_in_float32():
    _, adapted = made("transformer")
    adapted.backbone.bfloat16()
    ids, visual = inputs()
    out = opened(adapted)(ids, visual=visual.bfloat16())
    assert out.logits.dtype is torch.bfloat16 and out.state[0]["memory"].ssm.dtype is torch.float32
    assert all(p.dtype is torch.float32 for p in adapted.memories.parameters())


def test_reconstruction_looks_one_token_ahead():
    _, adapted = made("transformer")
    visual = inputs()[1]
    loss = adapted.reconstruction(visual)
    loss.backward()
    assert loss > 0 and adapted.memories[0].visual.weight.grad.abs().sum() > 0
    assert made("transformer", inject="add")[1].reconstruction(visual) == 0
    assert adapted.reconstruction(visual[:, :1]) == 0


@pytest.mark.parametrize("adapter", ["ssmi", "lora"])
def test_pictures_come_first_and_one_for_every_row(adapter):
    if adapter == "lora":
        pytest.importorskip("peft")
    model = VisualDecoder(visual_dim=5, d_model=64, n_layer=2, rank=16, max_share=0.5, adapter=adapter)
    ids, visual = torch.zeros(2, 3, dtype=torch.long), torch.randn(2, 4, 5)
    with pytest.raises(ValueError, match="visual has 1 rows, input_ids 2"):
        model(ids, visual=visual[:1])
    state = model(ids, visual=visual).state
    with pytest.raises(ValueError, match="belongs into the first call"):
        model(ids, state, visual=visual)


def test_lora_trains_as_many_parameters_and_keeps_plain_names():
    pytest.importorskip("peft")
    sizes = dict(visual_dim=5, d_model=64, n_layer=2, rank=16, max_share=0.5)
    ssmi, lora = VisualDecoder(**sizes), VisualDecoder(**sizes, adapter="lora")
    (own, _), (theirs, _) = ssmi.trainable(), lora.trainable()
    assert 0.7 * own < theirs <= own
    plain = ssmi.plain_decoder()
    names = set(plain.state_dict())
    assert names <= set(lora.reader.backbone.state_dict())
    lora.reader.backbone.load_state_dict(plain.state_dict(), strict=False)
    ids, visual = inputs()
    assert torch.allclose(lora(ids).logits, plain(ids).logits, atol=1e-6)
    copied = VisualDecoder(**sizes, adapter="lora")
    copied.load_state_dict(lora.state_dict())
    whole = lora.eval()(ids, visual=visual).logits
    assert torch.equal(copied.eval()(ids, visual=visual).logits, whole)
    first, state, _ = lora(ids[:, :3], visual=visual)
    assert torch.allclose(torch.cat([first, lora(ids[:, 3:], state).logits], 1), whole, atol=1e-5)
    whole.square().mean().backward()
    assert {n for n, p in lora.named_parameters() if p.grad is not None} == {
        n for n, p in lora.named_parameters() if p.requires_grad
    }
    with pytest.raises(ValueError, match="LoRA of rank 1 has .* raise rank"):
        VisualDecoder(**sizes | {"rank": 1, "layers": [0]}, adapter="lora")
    with pytest.raises(ValueError, match="would be trained, more than max_share=0.1"):
        VisualDecoder(**sizes | {"max_share": 0.1}, adapter="lora", lora_rank=20)
    with pytest.raises(ValueError, match="heads of even width"):
        VisualDecoder(**sizes | {"d_model": 31})
    with pytest.raises(ValueError, match="lora_rank is 3, but adapter is ssmi"):
        VisualDecoder(**sizes, lora_rank=3)
