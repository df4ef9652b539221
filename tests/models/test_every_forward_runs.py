"""Adapters, hooks, parametrisations and quantised replacements act on every module of every sequence model, in whole,
chunked, single-token, padded and packed passes alike."""

import inspect
import warnings

import pytest
import torch
from test_state_contract import NODES, VOCAB
from torch import nn
from torch.nn.utils import parametrize
from walker import check, leaves

from ssmzoo.presets import build_model, model_class


def build(name, dtype=torch.float64):
    torch.manual_seed(0)
    node = NODES[name]
    if "tie_embeddings" in inspect.signature(model_class(node["_target_"])).parameters:
        node = node | {"tie_embeddings": False}  # a tied head and its embedding are one weight under two names
    model = build_model(node).to(dtype).eval()
    with torch.no_grad():  # away from ones and zeros, where mistakes hide
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def passes(model):
    ids = torch.randint(VOCAB, (2, 6), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, 8, dtype=torch.bool)
    mask[:, 3:5] = False
    padded = torch.zeros(2, 8, dtype=torch.long).masked_scatter(mask, ids)

    def pieces(sizes):
        state, logits = None, []
        for piece in ids.split(sizes, dim=1):
            out = model(piece, state)
            state = out.state
            logits.append(out.logits)
        return torch.cat(logits, dim=1)

    def steps():
        with torch.no_grad():  # where mixers may take a fused path, over several tokens too
            return pieces([3, 1, 1, 1])

    def packed():
        """The sequence as the second of two documents."""
        number = torch.tensor([0] * 3 + [1] * 6).expand(2, -1)
        return model(torch.cat([ids[:, :3].flip(1), ids], dim=1), seq_idx=number).logits[:, 3:]

    return {
        "one pass": lambda: model(ids).logits,
        "chunks": lambda: pieces([3, 1, 2]),
        "single tokens": steps,
        "a padded pass": lambda: model(padded, mask=mask).logits[mask].view(2, 6, -1),
        "a packed pass": packed,
    }


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", NODES)
def test_a_change_of_any_module_acts_in_every_pass(name, every):
    model = build(name)
    assert len(leaves(model)) >= 1
    assert check(model, passes(model), every) == []


@pytest.mark.parametrize("name", NODES)
def test_dynamically_quantised_layers_are_called_in_every_pass(name):
    model = build(name, torch.float32)
    for m in list(model.modules()):  # torch quantises no parametrised layer: its weight becomes what it is now
        if isinstance(m, nn.Linear) and parametrize.is_parametrized(m):
            parametrize.remove_parametrizations(m, "weight")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    called = set()
    kind = torch.ao.nn.quantized.dynamic.Linear
    layers = {n: m for n, m in model.named_modules() if isinstance(m, kind)}
    for n, m in layers.items():
        m.register_forward_hook(lambda module, args, y, n=n: called.add(n))
    results = {}
    with torch.no_grad():
        for title, run in passes(model).items():
            called.clear()
            results[title] = run()
            assert called == set(layers), title
    whole = results.pop("one pass")
    assert layers and whole.isfinite().all()
    for title, y in results.items():  # activations are rounded to 8 bits by the range of each call
        assert (y - whole).norm() < 0.2 * whole.norm(), title


@pytest.mark.parametrize("name", ["mamba", "mamba2", "mamba3", "moe_mamba", "transformer"])
def test_lora_of_peft(name):
    peft = pytest.importorskip("peft", reason="peft is not installed; pip install '.[hf]'")
    model = build(name)
    kinds = {n: type(m) for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Embedding))}
    config = peft.LoraConfig(r=3, target_modules=list(kinds), init_lora_weights=False)
    with torch.no_grad():
        plain = passes(model)["one pass"]()
    adapted = peft.inject_adapter_in_model(config, model).to(torch.float64).eval()
    results = {title: run() for title, run in passes(adapted).items()}
    whole = results["one pass"]
    assert (whole - plain).norm() > 1e-3 * plain.norm()
    for title, y in results.items():
        assert (y - whole).norm() < 1e-8 * whole.norm(), title
    whole.square().sum().backward()
    trained = {n: p.grad for n, p in adapted.named_parameters() if "lora_" in n}
    assert len(trained) == 2 * len(kinds) and all(g is not None and g.norm() > 0 for g in trained.values())
