"""Cases of benchmarks/ops.py: the language presets for a laptop, decoding beside Mamba and training beside Mamba-2."""

from __future__ import annotations

import functools

import torch
from ops import Case

import ssmzoo
from ssmzoo.inference.decoding import Decoding
from ssmzoo.layers.feedforward.moe import active_parameters

VOCAB, SHAPE, TOKENS = 256, (8, 256), 20
PRESETS = (
    *("based", "jrt_rnn", "gated_ssm", "hawk", "cheems", "hydra_lm", "mamba_hybrid", "mamba_hybrid_moe"),
    *("mamba2_hybrid", "lightning", "gated_deltanet", "kda", "mamba3", "transformer", "transformer_moe", "moe_mamba"),
)


def build(name: str, **sizes) -> torch.nn.Module:
    torch.manual_seed(0)
    return ssmzoo.create_model(name, vocab_size=VOCAB, **sizes)


@functools.cache
def active(name: str, **sizes) -> int:
    """Parameters that a token meets: those of experts and memories by the share that one token uses."""
    with torch.device("meta"):
        return active_parameters(build(name, **sizes))


@functools.cache
def twin(name: str) -> dict[str, int]:
    """Width and depth of the Mamba-2 whose parameters come nearest to the active ones of a preset."""
    sizes = [{"d_model": d, "n_layer": n} for d in range(96, 321, 16) for n in (3, 4, 5)]
    return min(sizes, key=lambda s: abs(active("mamba2", **s) - active(name)))


def decode(name: str):
    """One sequence, some tokens after a prompt of 32, as `generate` decodes them."""

    def prepare():
        model, ids = build(name).eval(), torch.randint(VOCAB, (1, 32))
        with torch.inference_mode():
            start = model(ids).state

        @torch.inference_mode()
        def run():
            decoding = Decoding(model, start)
            for t in range(TOKENS):
                decoding(ids[:, t])

        return run

    return prepare


def training_step(name: str, **sizes):
    """Forward, backward and AdamW; JRT reads half of its sequences in both directions, as it is trained."""

    def prepare():
        model = build(name, **sizes).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        ids = torch.randint(VOCAB, (SHAPE[0], SHAPE[1] + 1))
        more = {"prefix": SHAPE[1] // 2} if name.startswith("jrt") else {}

        def step():
            out = model(ids[:, :-1], **more)
            loss = torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), ids[:, 1:].flatten())
            (loss + sum(v for k, v in out.aux.items() if k.endswith("_loss"))).backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    return prepare


def beside_mamba2(name: str) -> Case:
    """Each preset in a case of its own, beside a Mamba-2 of its size."""
    title = f"training step of {name}, {SHAPE[0]} x {SHAPE[1]} tokens, at equal parameters"
    contenders = {"mamba2": lambda: training_step("mamba2", **twin(name))(), name: training_step(name)}
    return Case(title, contenders, at_most=1.5, repeats=3, by_name=True,
                size=lambda label: active(name) if label == name else active("mamba2", **twin(name)))  # fmt: skip


CASES = [
    Case(
        f"decoding {TOKENS} tokens, language presets, per byte of parameters",
        {name: decode(name) for name in ("mamba", "mamba2", *PRESETS)},
        at_most=1.3,
        repeats=40,
        by_name=True,
        size=active,
    ),
    *map(beside_mamba2, PRESETS),
]
