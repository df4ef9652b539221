"""The state contract: however a causal model is fed, it computes the same.

One pass = any split into chunks = token by token = packed with boundaries = padded anywhere = batch permuted, in values
and in gradients. Every language and automaton model of configs/model is walked over in a tiny size: a new one joins by
being registered. Models that are not causal say so with a class attribute `causal = False`.
"""

import functools
import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ssmzoo
from ssmzoo.layers.decoder import reads_prefixes
from ssmzoo.layers.state import map_state, select_rows
from ssmzoo.presets import build_model, model_class, read_model_config

VOCAB, BATCH, LENGTH = 29, 3, 12
# Whatever the constructor calls its sizes, they become small.
TINY = {
    "vocab_size": VOCAB,
    "d_model": 16,
    "n_layer": 2,
    "n_blocks": 2,
    "n_heads": 2,
    "num_heads": 2,
    "n_experts": 3,
    "d_expert": 8,
    "input_size": VOCAB,
    "num_classes": 7,
    "state_size": 6,
    "d_state": 4,
    "d_intermediate": 0,
    "pad_vocab_size_multiple": 1,
}
TINY_BY_CLASS = {
    "BasedLM": {"n_layer": 3, "layer_pattern": "CTS", "feature_dim": 3, "window": 4, "d_ff": 8},
    "JRTRNNLM": {"n_layer": 3, "layer_pattern": "CPS", "feature_dim": 3, "window": 4, "d_ff": 8},
    "HydraLM": {
        **{"attn_every": 2, "window": 3, "chunk_size": 2, "n_slots": 3},
        "pkm": {"n1": 3, "n2": 4, "key_dim": 3, "value_dim": 5, "top_k": 2},
    },
    "CheemsLM": {
        "n_kv_heads": None,
        "d_ff": 8,
        "layer_pattern": "SA",
        "n_experts": 9,
        "experts_per_head": 2,
        "d_retrieval": 4,
    },
    "GatedDeltaNetLM": {"num_heads": 2, "head_dim": 3, "num_v_heads": 4, "layer_pattern": "D"},
    "KimiDeltaLM": {"d_model": 32, "head_dim": 4, "d_ff": 8},
    "HybridLM": {
        "n_layer": 6,
        "d_ff": 8,
        "head_dim": 8,
        "layer_pattern": "MSDKLA",
        "mixers": {"M": {"d_state": 4}, "S": {"d_state": 4}, "D": {"conv_size": 2}, "A": {"rotary_emb_dim": 4}},
    },
    "Mamba2LM": {"ssm_cfg": {"d_state": 4, "headdim": 8, "chunk_size": 4}},
    "Mamba3LM": {"ssm_cfg": {"d_state": 8, "headdim": 8, "chunk_size": 4}},
}
TINY_BY_NAME = {  # where a class has another preset for all of its layers
    "lightning": {"n_layer": 2, "layer_pattern": "LA", "mixers": {"A": {"rotary_emb_dim": 4}}},
}
MORE = {  # corners that no preset reaches
    "mamba: biases, MLP, LayerNorm, short convolution": (
        "mamba",
        {"ssm_cfg": {"d_conv": 2, "bias": True}, "d_intermediate": 8, "rms_norm": False, "tie_embeddings": False},
    ),
    "mamba: no convolution to speak of": ("mamba", {"ssm_cfg": {"d_conv": 1}}),
    "mamba2: attention, partial SSM, limits": (
        "mamba2",
        {
            "n_layer": 3,
            "attn_layer_idx": [1],
            "attn_cfg": {"num_heads": 4, "num_heads_kv": 2, "d_conv": 3, "rotary_emb_dim": 4, "mlp_dim": 10},
            "ssm_cfg": {"d_state": 4, "headdim": 8, "d_ssm": 24, "dt_limit": (0.01, 0.05), "norm_before_gate": True},
        },
    ),
    "cheems: growing states, a dense MLP, biases, hidden keys": (
        "cheems",
        {"a_mode": "raw", "n_experts": 0, "bias": True, "mask_ratio": 0.4, "n_kv_heads": 1, "tie_embeddings": False},
    ),
    "gated_ssm: released form": ("gated_ssm", {"layer_pattern": "C", "form": "released"}),
    "gated_ssm: causal": ("gated_ssm", {"layer_pattern": "C"}),
    "hawk: odd channels": ("hawk", {"d_state": 5, "d_conv": 2, "layer_pattern": "CB"}),
    "gated_deltanet: attention, tied": (
        "gated_deltanet",
        {"layer_pattern": "DA", "attn_cfg": {"num_heads": 2}, "tie_embeddings": True, "allow_neg_eigval": False},
    ),
    "transformer: selective attention": ("transformer", {"attention": "selective"}),
    "transformer: threshold relative attention": ("transformer", {"attention": "threshold"}),
    "hydra_lm: convolutions, no memories, chunks of three": (
        "hydra_lm",
        {"ssm": "conv", "workspace": None, "pkm": None, "chunk_size": 3, "n_layer": 3},
    ),
    "mamba3: several inputs and outputs": (
        "mamba3",
        {
            "ssm_cfg": {
                "d_state": 8,
                "headdim": 8,
                "ngroups": 2,
                "is_mimo": True,
                "mimo_rank": 3,
                "is_outproj_norm": True,
                "rope_fraction": 1.0,
            }
        },
    ),
}

# Published forms that stand outside of the contract, each behind a named argument: what they break, and why.
OUTSIDE = {
    "hydra_lm, routing=chunk": ("splits", "a token's experts follow from its whole chunk, later tokens included"),
    "hydra_lm, workspace=published": ("splits", "the workspace reads the mean of the whole sequence"),
    "cheems, mask_ratio=0.4 mask_over=all": ("splits", "a key is hidden by its rank among all keys, later ones too"),
    "moe_mamba, router=expert_choice": ("splits", "experts choose among the sequences of a batch"),
    "jrt_rnn, exact_mask=false": ("padding", "a key of padding is 0 before the features, which leaves its weight of 1"),
    "hawk, conv_across_documents=true": ("packing", "the convolution sees the document before"),
    "mamba2, ssm_cfg.clamp_steps=false": ("splits", "single steps forget dt_limit"),
    "mamba2, ssm_cfg.learnable_init_states=true": ("packing", "only the first document has the learned state"),
}


def tiny_node(name: str, **overrides) -> dict:
    node = read_model_config(name)["model"]
    cls = model_class(node["_target_"])
    known = inspect.signature(cls).parameters
    if node.get("attn_layer_idx"):  # presets of many layers
        node |= {"attn_layer_idx": [1], "attn_cfg": {"num_heads": 2, "rotary_emb_dim": 4}}
    small = {k: v for k, v in TINY.items() if k in known} | TINY_BY_CLASS.get(cls.__name__, {})
    return node | small | TINY_BY_NAME.get(name, {}) | overrides


def discover() -> dict[str, dict]:
    """{name: constructor arguments}; presets that differ in size only are the same tiny model, named once."""
    nodes: dict[str, dict] = {}
    for name in sorted([*ssmzoo.list_models(task="language"), *ssmzoo.list_models(task="formal")], key=len):
        node = tiny_node(name)
        if getattr(model_class(node["_target_"]), "causal", True) and node not in nodes.values():
            nodes[name] = node
    return nodes | {title: tiny_node(name, **overrides) for title, (name, overrides) in MORE.items()}


NODES = discover()
every_model = pytest.mark.parametrize("name", NODES)
few = settings(max_examples=4, deadline=None, derandomize=True, database=None)


@functools.cache
def tiny_model(name: str, dtype: torch.dtype = torch.float64) -> torch.nn.Module:
    torch.manual_seed(0)
    model = build_model(NODES[name]).to(dtype).eval()
    with torch.no_grad():  # away from ones and zeros, where mistakes hide
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


@functools.cache
def one_pass(name: str, dtype: torch.dtype = torch.float64):
    """ids (b l), loss weights (b l v), logits and gradients of the plain call."""
    torch.manual_seed(1)
    model = tiny_model(name, dtype)
    ids = torch.randint(VOCAB, (BATCH, LENGTH))
    weights = torch.randn(BATCH, LENGTH, model(ids).logits.shape[-1], dtype=dtype)
    return ids, weights, *with_gradients(model, lambda: model(ids).logits, weights)


def with_gradients(model, compute, weights):
    model.zero_grad(set_to_none=True)
    logits = compute()
    (logits * weights).sum().backward()
    return logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def feed(model, pieces, state=None, **more):
    """Logits of the pieces in a row, and the state after them; `more` holds one list entry per piece."""
    logits = []
    for i, piece in enumerate(pieces):
        out = model(piece, state, **{k: v[i] for k, v in more.items()})
        state = out.state
        logits.append(out.logits)
    return torch.cat(logits, dim=1), state


def assert_close(got, expected, tolerance=1e-6):
    """Relative to the norm of the whole tensor (or, for gradients, of each parameter's)."""
    if isinstance(expected, dict):
        assert got.keys() == expected.keys()
        total = sum(e.norm() ** 2 for e in expected.values()) ** 0.5
        for key, e in expected.items():
            assert (got[key] - e).norm() <= tolerance * (e.norm() + 1e-3 * total), key
    else:
        assert (got - expected).norm() <= tolerance * expected.norm()


def splits(length):
    """Lengths of at least one that add up to `length`."""
    return st.sets(st.integers(1, length - 1), max_size=5).map(
        lambda cuts: [b - a for a, b in zip([0, *sorted(cuts)], [*sorted(cuts), length])]
    )


@every_model
@few
@given(sizes=splits(LENGTH))
def test_any_split_is_one_pass(name, sizes):
    model, (ids, weights, logits, gradients) = tiny_model(name), one_pass(name)
    got, got_gradients = with_gradients(model, lambda: feed(model, ids.split(sizes, dim=1))[0], weights)
    assert_close(got, logits)
    assert_close(got_gradients, gradients)


@every_model
def test_token_by_token_is_one_pass(name):
    model, (ids, weights, logits, gradients) = tiny_model(name), one_pass(name)
    got, got_gradients = with_gradients(model, lambda: feed(model, ids.split(1, dim=1))[0], weights)
    assert_close(got, logits)
    assert_close(got_gradients, gradients)
    with torch.inference_mode():  # where mixers may take their short path
        assert_close(feed(model, ids.split([4, *[1] * (LENGTH - 4)], dim=1))[0], logits)


@every_model
def test_single_precision_is_one_pass(name):
    model, (ids, weights, logits, gradients) = tiny_model(name, torch.float32), one_pass(name, torch.float32)
    got, got_gradients = with_gradients(model, lambda: feed(model, ids.split([5, 1, 6], dim=1))[0], weights)
    assert_close(got, logits, 1e-4)
    assert_close(got_gradients, gradients, 1e-4)
    with torch.inference_mode():
        assert_close(feed(model, ids.split([4, *[1] * (LENGTH - 4)], dim=1))[0], logits, 1e-4)


@every_model
@few
@given(
    positions=st.lists(st.sets(st.integers(0, 17), min_size=1, max_size=LENGTH), min_size=BATCH, max_size=BATCH),
    sizes=splits(18),
)
def test_padding_anywhere_changes_nothing(name, positions, sizes):
    """Rows of unequal length, their tokens at random positions among arbitrary other ids, fed in chunks."""
    model, (ids, weights, _, _) = tiny_model(name), one_pass(name)
    positions = [sorted(p) for p in positions]
    padded, mask = torch.randint(VOCAB, (BATCH, 18)), torch.zeros(BATCH, 18, dtype=torch.bool)
    padded_weights = weights.new_zeros(BATCH, 18, weights.shape[-1])
    for i, p in enumerate(positions):
        padded[i, p], mask[i, p], padded_weights[i, p] = ids[i, : len(p)], True, weights[i, : len(p)]
    after = ids[:, -2:]

    def alone():
        rows = [model(ids[i : i + 1, : len(p)]) for i, p in enumerate(positions)]
        nexts = [model(after[i : i + 1], row.state).logits for i, row in enumerate(rows)]
        return torch.cat([row.logits[0] for row in rows] + [n[0] for n in nexts])

    def together():
        logits, state = feed(model, padded.split(sizes, dim=1), mask=mask.split(sizes, dim=1))
        return torch.cat([logits[i, p] for i, p in enumerate(positions)] + list(model(after, state).logits))

    w = torch.cat([weights[i, : len(p)] for i, p in enumerate(positions)] + list(weights[:, -2:]))
    expected, gradients = with_gradients(model, alone, w)
    got, got_gradients = with_gradients(model, together, w)
    assert_close(got, expected)
    assert_close(got_gradients, gradients)


@every_model
@few
@given(lengths=splits(LENGTH), first=st.integers(0, 7))
def test_packed_documents_do_not_meet(name, lengths, first):
    model, (ids, weights, _, _) = tiny_model(name), one_pass(name)
    numbers = torch.arange(len(lengths)).flip(0) * 3 + first  # the value does not matter, only that it changes
    seq_idx = numbers.repeat_interleave(torch.tensor(lengths)).expand(BATCH, -1)
    documents = ids.split(lengths, dim=1)
    expected, gradients = with_gradients(model, lambda: torch.cat([model(d).logits for d in documents], dim=1), weights)
    packed = with_gradients(model, lambda: model(ids, seq_idx=seq_idx).logits, weights)
    assert_close(packed[0], expected)
    assert_close(packed[1], gradients)
    state, last = model(ids, seq_idx=seq_idx).state, model(documents[-1]).state
    assert_close(model(ids[:, :3], state).logits, model(ids[:, :3], last).logits)


@every_model
def test_packed_documents_in_padded_chunks(name):
    model, (ids, _, _, _) = tiny_model(name), one_pass(name)
    seq_idx = torch.tensor([4] * 5 + [7] * 7).expand(BATCH, -1)
    mask = torch.tensor(
        [
            [0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1],
            [1, 1, 1, 1, 0, 1, 0, 0, 1, 1, 1, 0],
            [1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0],
        ]
    ).bool()
    sizes = [3, 4, 5]  # no chunk begins with a document: position 0 always continues
    logits, state = feed(model, ids.split(sizes, 1), mask=mask.split(sizes, 1), seq_idx=seq_idx.split(sizes, 1))
    for i in range(BATCH):
        documents = [ids[i, mask[i] & (seq_idx[i] == number)][None] for number in (4, 7)]
        outs = [model(d) for d in documents]
        assert_close(logits[i, mask[i]], torch.cat([o.logits[0] for o in outs]))
        row = select_rows(state, torch.tensor([i]))
        assert_close(model(ids[:1, :2], row).logits, model(ids[:1, :2], outs[1].state).logits)


ONE_HOT = {"rnn", "lstm", "sd_ssm", "complex_diagonal_ssm"}  # read one-hot symbols: there is no embedding to look at


@pytest.mark.parametrize("name", [name for name in NODES if name not in ONE_HOT])
def test_no_gradient_crosses_a_document_boundary(name):
    model, (ids, weights, _, _) = tiny_model(name), one_pass(name)
    embedding = next(m for m in model.modules() if isinstance(m, torch.nn.Embedding))
    seen = []
    handle = embedding.register_forward_hook(lambda module, inputs, output: seen.append(output))
    try:
        logits = model(ids, seq_idx=torch.tensor([0] * 5 + [1] * 7).expand(BATCH, -1)).logits
    finally:
        handle.remove()
    (gradient,) = torch.autograd.grad((logits * weights)[:, 5:].sum(), seen)
    assert gradient[:, 5:].abs().min() > 0
    assert torch.equal(gradient[:, :5], torch.zeros_like(gradient[:, :5]))


@every_model
def test_rows_do_not_know_each_other(name):
    """Batch permuted, and the state reordered between two chunks."""
    model, (ids, weights, logits, gradients) = tiny_model(name), one_pass(name)
    order = torch.tensor([2, 0, 1])

    def permuted():
        first = model(ids[:, :5])
        second = model(ids[order, 5:], select_rows(first.state, order))
        return torch.cat([first.logits, second.logits[order.argsort()]], dim=1)

    got, got_gradients = with_gradients(model, permuted, weights)
    assert_close(got, logits)
    assert_close(got_gradients, gradients)
    assert_close(model(ids[1:2]).logits, logits[1:2])


@every_model
@pytest.mark.parametrize("length", [1, 4])
def test_a_state_can_be_used_twice(name, length):
    model, (ids, _, _, _) = tiny_model(name), one_pass(name)
    with torch.no_grad():
        state = model(ids[:, :4]).state
        kept = map_state(torch.clone, state)
        first = model(ids[:, 4 : 4 + length], state).logits
        assert torch.equal(model(ids[:, 4 : 4 + length], state).logits, first)
        assert torch.equal(model(ids[:, 4 : 4 + length], kept).logits, first)


@every_model
def test_a_prefix_is_read_whole_or_refused_in_words(name):
    model, (ids, _, logits, _) = tiny_model(name), one_pass(name)
    assert_close(model(ids, prefix=0).logits, logits)
    try:
        whole = model(ids, prefix=5).logits
    except ValueError as refusal:
        assert "reads in one direction only" in str(refusal)
        return
    assert (whole[:, :4] - logits[:, :4]).norm() > 1e-3 * logits[:, :4].norm()
    first = model(ids[:, :7], prefix=5)
    second = model(ids[:, 7:], first.state)
    assert_close(torch.cat([first.logits, second.logits], dim=1), whole)
    with pytest.raises(ValueError, match="does not go with state"):
        model(ids[:, 7:], first.state, prefix=2)


@every_model
@few
@given(sizes=splits(LENGTH - 5))
def test_after_a_whole_prefix_any_split_is_one_pass(name, sizes):
    model, (ids, weights, _, _) = tiny_model(name), one_pass(name)
    try:
        whole, gradients = with_gradients(model, lambda: model(ids, prefix=5).logits, weights)
    except ValueError as refusal:
        assert "reads in one direction only" in str(refusal)
        return

    def split():
        first = model(ids[:, :5], prefix=5)
        rest = feed(model, ids[:, 5:].split(sizes, dim=1), first.state)[0]
        return torch.cat([first.logits, rest], dim=1)

    got, got_gradients = with_gradients(model, split, weights)
    assert_close(got, whole)
    assert_close(got_gradients, gradients)


@every_model
@few
@given(lengths=splits(LENGTH), data=st.data())
def test_packed_documents_have_prefixes_of_their_own(name, lengths, data):
    """Also among padding: rows of one document and holes."""
    model, (ids, weights, _, _) = tiny_model(name), one_pass(name)
    if not reads_prefixes(model):
        with pytest.raises(ValueError, match="reads"):
            model(ids, prefix=torch.arange(LENGTH).expand(BATCH, -1) < 5)
        return
    prefixes = [data.draw(st.integers(0, n)) for n in lengths]
    inside = torch.cat([torch.arange(n) < p for n, p in zip(lengths, prefixes)]).expand(BATCH, -1)
    seq_idx = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).expand(BATCH, -1)

    def alone():
        return torch.cat([model(d, prefix=p).logits for d, p in zip(ids.split(lengths, 1), prefixes)], dim=1)

    expected, gradients = with_gradients(model, alone, weights)
    got, got_gradients = with_gradients(model, lambda: model(ids, seq_idx=seq_idx, prefix=inside).logits, weights)
    assert_close(got, expected)
    assert_close(got_gradients, gradients)
    mask = torch.ones(BATCH, LENGTH + 3, dtype=torch.bool)
    mask[:, [0, 4, LENGTH]] = False
    padded, there = torch.zeros(BATCH, LENGTH + 3, dtype=torch.long), torch.zeros(BATCH, LENGTH + 3, dtype=torch.bool)
    number = there.long()
    padded[mask], there[mask], number[mask] = ids.flatten(), inside.flatten(), seq_idx.flatten()
    logits = model(padded, mask=mask, seq_idx=number, prefix=there).logits
    assert_close(logits[mask].view_as(expected), expected)


@every_model
def test_a_prefix_in_the_middle_of_a_document_is_refused(name):
    model, (ids, _, _, _) = tiny_model(name), one_pass(name)
    inside = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    inside[1, 3:5] = True
    with pytest.raises(ValueError, match="does not begin a document|reads in one direction only"):
        model(ids, prefix=inside)
    with pytest.raises(ValueError, match="prefix has shape|reads in one direction only"):
        model(ids, prefix=inside[:, 1:])


def splits_differ(model, ids) -> bool:
    with torch.no_grad():
        whole, pieces = model(ids).logits, feed(model, ids.split([5, *[1] * (LENGTH - 5)], dim=1))[0]
    return not torch.allclose(pieces, whole)


def padding_differs(model, ids) -> bool:
    mask = torch.arange(LENGTH + 3).expand(BATCH, -1) >= 3
    padded = torch.cat([ids[:, :3], ids], dim=1)
    return not torch.allclose(model(padded, mask=mask).logits[:, 3:], model(ids).logits)


def packing_differs(model, ids) -> bool:
    seq_idx = (torch.arange(LENGTH) >= 5).long().expand(BATCH, -1)
    alone = torch.cat([model(ids[:, :5]).logits, model(ids[:, 5:]).logits], dim=1)
    return not torch.allclose(model(ids, seq_idx=seq_idx).logits, alone)


@pytest.mark.parametrize("title", OUTSIDE)
def test_what_stands_outside_of_the_contract_does_so_for_its_reason(title):
    """It differs there, or refuses in words; so nothing stays on the list that has found its way in."""
    preset, *words = title.replace(",", "").split()
    overrides: dict = {}
    for word in words:
        (key, value) = word.split("=")
        value = {"true": True, "false": False, "0.4": 0.4}.get(value, value)
        if key.startswith("ssm_cfg."):
            cfg = {"d_state": 4, "headdim": 8, "dt_limit": (0.01, 0.05), key.removeprefix("ssm_cfg."): value}
            key, value = "ssm_cfg", cfg
        overrides[key] = value
    torch.manual_seed(0)
    model = build_model(tiny_node(preset, **overrides)).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.5 * torch.randn_like(parameter)
    differs = {"splits": splits_differ, "padding": padding_differs, "packing": packing_differs}[OUTSIDE[title][0]]
    try:
        assert differs(model, torch.randint(VOCAB, (BATCH, LENGTH)))
    except ValueError as refusal:
        assert len(str(refusal)) > 40
