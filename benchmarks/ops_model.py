"""Cases of benchmarks/ops.py: whole models, a training step and decoding, beside Hugging Face's on a CPU."""

from __future__ import annotations

import statistics
import time

import torch
from ops import Case

import ssmzoo
from ssmzoo import ops
from ssmzoo.inference.decoding import Decoding
from ssmzoo.inference.generate import prefill
from ssmzoo.ops import native

VOCAB, WIDTH, LAYERS = 256, 256, 4


def ours():
    torch.manual_seed(0)
    return ssmzoo.create_model("mamba", vocab_size=VOCAB, d_model=WIDTH, n_layer=LAYERS)


def hugging_face():
    from ssmzoo._torchvision import make_importable

    make_importable()
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    return MambaForCausalLM(MambaConfig(vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=LAYERS))


def training_step(build, logits):
    def prepare():
        model = build().train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        ids = torch.randint(0, VOCAB, (4, 257), generator=torch.Generator().manual_seed(0))

        def step():
            out = logits(model, ids[:, :-1])
            loss = torch.nn.functional.cross_entropy(out.flatten(0, 1), ids[:, 1:].flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    return prepare


def decode(tokens: int):
    """One sequence, greedy, `tokens` new ones after a prompt of 16."""

    def prepare():
        model = ours().eval()
        prompt = torch.zeros(1, 16, dtype=torch.long)

        @torch.inference_mode()
        def run():
            logits, state = prefill(model, prompt)
            decoding = Decoding(model, state)
            for _ in range(tokens):
                logits = decoding(logits.argmax(-1))

        return run

    return prepare


def decode_hugging_face(tokens: int):
    def prepare():
        model = hugging_face().eval()
        prompt = torch.zeros(1, 16, dtype=torch.long)

        @torch.inference_mode()
        def run():
            model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=False,
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                pad_token_id=0,
            )

        return run

    return prepare


def token_at(position: int):
    """Milliseconds per token (median of 400) after a prefix of `position` tokens, as the unit "ms per token"."""

    def prepare():
        model = ours().eval()

        @torch.inference_mode()
        def run() -> float:
            out, left = None, position
            while left > 0:
                n = min(left, 4096)
                out = model(torch.randint(0, VOCAB, (1, n)), None if out is None else out.state)
                left -= n
            token, decoding, times = out.logits[:, -1].argmax(-1), Decoding(model, out.state), []
            for _ in range(400):
                start = time.perf_counter()
                decoding(token)
                times.append(1e3 * (time.perf_counter() - start))
            return statistics.median(times)

        return run

    return prepare


def normalise(backend: str):
    def prepare():
        x, weight = torch.randn(4, 256, WIDTH, requires_grad=True), torch.ones(WIDTH, requires_grad=True)
        dy = torch.randn(4, 256, WIDTH)

        def run():
            with ops.backend(backend):
                torch.autograd.grad(ops.rms_norm(x, weight), (x, weight), dy)

        return run

    return prepare


def scan_into_fresh_memory(at_once: bool):
    """A forward scan whose result of 50 MB the system has to hand out anew."""

    def prepare():
        u, delta = torch.randn(1, 1536, 8192), torch.rand(1, 1536, 8192)
        B, C = torch.randn(1, 16, 8192), torch.randn(1, 16, 8192)
        A, commit = -torch.rand(1536, 16), native._COMMIT

        def run():
            native._COMMIT = commit if at_once else None
            ops.selective_scan_fn(u, delta, A, B, C)
            native._COMMIT = commit

        return run

    return prepare


CASES = [
    Case(
        f"rms_norm forward + backward, (4, 256, {WIDTH})",
        {"ssmzoo": normalise("c"), "eight operations of torch": normalise("torch")},
    ),
    Case(
        "scan forward (1, 1536, 8192, 16) into fresh memory",
        {"ssmzoo": scan_into_fresh_memory(True), "page by page": scan_into_fresh_memory(False)},
    ),
    Case(
        f"training step of mamba, d_model {WIDTH}, {LAYERS} layers, 4 x 256 tokens",
        {
            "ssmzoo": training_step(ours, lambda m, ids: m(ids).logits),
            "transformers": training_step(hugging_face, lambda m, ids: m(input_ids=ids, use_cache=False).logits),
        },
        target=200,
        repeats=2,
    ),
    Case(
        f"decoding 128 tokens, d_model {WIDTH}, {LAYERS} layers, 1 sequence",
        {"ssmzoo": decode(128), "transformers generate": decode_hugging_face(128)},
        target=8,
        repeats=5,
        quick=True,
    ),
    Case(
        "decoding cost of a token by position",
        {"at 100": token_at(100), "at 100,000": token_at(100_000)},
        unit="ms per token",
    ),
]
