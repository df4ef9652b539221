"""The state contract, put to Hugging Face's Mamba and to ours: the same weights, the same tokens, the same checks.

    python benchmarks/state_contract_hf.py            # needs `pip install transformers`

Every row compares the logits of the real tokens with those of one plain pass over each sequence: the norm of the
difference over the norm of the expected logits, in float32 on the CPU.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

from ssmzoo._torchvision import make_importable
from ssmzoo.released.load import load_official

make_importable()
from transformers import MambaConfig, MambaForCausalLM  # noqa: E402

SIZES = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 4, "state_size": 16}
BATCH, LENGTH, LENGTHS = 4, 24, (24, 17, 9, 3)


def hf_feed(model, pieces, masks=None) -> Tensor:
    cache, logits = None, []
    for i, piece in enumerate(pieces):
        out = model(piece, cache_params=cache, use_cache=True, attention_mask=None if masks is None else masks[i])
        cache = out.cache_params
        logits.append(out.logits)
    return torch.cat(logits, dim=1)


def our_feed(model, pieces, masks=None) -> Tensor:
    state, logits = None, []
    for i, piece in enumerate(pieces):
        out = model(piece, state=state, mask=None if masks is None else masks[i].bool())
        state = out.state
        logits.append(out.logits)
    return torch.cat(logits, dim=1)


def checks(feed, model, ids: Tensor) -> dict[str, float]:
    """Relative error of every way of feeding `ids` (b l)."""
    expected = feed(model, [ids])
    result = {}

    def compare(name, got, wanted=expected):
        result[name] = ((got - wanted).norm() / wanted.norm()).item()

    compare("two chunks", feed(model, ids.split(LENGTH // 2, dim=1)))
    compare("chunks of 5", feed(model, ids.split(5, dim=1)))
    compare("prefill, then token by token", feed(model, ids.split([8, *[1] * (LENGTH - 8)], dim=1)))
    compare("token by token from the start", feed(model, ids.split(1, dim=1)))
    order = torch.arange(BATCH).flip(0)
    compare("batch permuted", feed(model, [ids[order]])[order])
    for side in ("left", "right"):
        padded, mask = torch.zeros_like(ids), torch.zeros_like(ids)
        for i, n in enumerate(LENGTHS):
            place = slice(LENGTH - n, LENGTH) if side == "left" else slice(0, n)
            padded[i, place], mask[i, place] = ids[i, :n], 1
        real = mask.bool()
        wanted = torch.cat([expected[i, :n] for i, n in enumerate(LENGTHS)])
        compare(f"{side} padding", feed(model, [padded], [mask])[real], wanted)
        compare(
            f"{side} padding, two chunks",
            feed(model, padded.split(LENGTH // 2, 1), mask.split(LENGTH // 2, 1))[real],
            wanted,
        )
        more = ids[:, :4]
        wanted = torch.cat(
            [feed(model, [torch.cat([ids[i : i + 1, :n], more[i : i + 1]], 1)])[:, -4:] for i, n in enumerate(LENGTHS)]
        )
        ones = torch.ones_like(more)
        pieces = [padded, *more.split(1, 1)], [mask, *ones.split(1, 1)]
        compare(f"{side} padding, then decoding", feed(model, *pieces)[:, -4:], wanted)
    return result


def tokens_per_second(step, tokens: int = 4, windows: int = 150) -> float:
    """Greedy decoding of one sequence, the fastest of `windows` runs of `tokens` steps."""
    best = float("inf")
    token = torch.zeros(1, 1, dtype=torch.long)
    state = step(token.expand(1, 16), None)[1]
    for _ in range(windows):
        start = time.perf_counter()
        for _ in range(tokens):
            logits, state = step(token, state)
            token = logits[:, -1:].argmax(-1)
        best = min(best, time.perf_counter() - start)
    return tokens / best


@torch.inference_mode()
def main() -> None:
    torch.manual_seed(0)
    theirs = MambaForCausalLM(MambaConfig(**SIZES)).eval()
    for parameter in theirs.parameters():  # as after training: biases are not zero, and the state matters
        parameter += 0.2 * torch.randn_like(parameter)
    ours = load_official("mamba_hf", theirs.state_dict(), **SIZES)
    ids = torch.randint(SIZES["vocab_size"], (BATCH, LENGTH))
    a, b = checks(hf_feed, theirs, ids), checks(our_feed, ours, ids)
    print(f"torch threads: {torch.get_num_threads()}")
    print(f"{'relative error of the logits':32s} {'transformers':>13s} {'ssmzoo':>13s}")
    for name in a:
        print(f"{name:32s} {a[name]:13.1e} {b[name]:13.1e}")
    print(f"{'packed documents (seq_idx)':32s} {'no such input':>13s} {packed(ours, ids):13.1e}")
    sizes = SIZES | {"hidden_size": 256, "vocab_size": 256}
    theirs = MambaForCausalLM(MambaConfig(**sizes)).eval()
    ours = load_official("mamba_hf", theirs.state_dict(), **sizes)

    def hf_step(ids, cache):
        out = theirs(ids, cache_params=cache, use_cache=True)
        return out.logits, out.cache_params

    slow, fast = tokens_per_second(hf_step), tokens_per_second(lambda ids, state: ours(ids, state=state)[:2])
    print(f"{'decoding, d_model 256, tokens/s':32s} {slow:13.0f} {fast:13.0f}")


def packed(model, ids: Tensor) -> float:
    seq_idx = (torch.arange(LENGTH) >= 10).long().expand(BATCH, -1)
    wanted = torch.cat([model(ids[:, :10]).logits, model(ids[:, 10:]).logits], dim=1)
    return ((model(ids, seq_idx=seq_idx).logits - wanted).norm() / wanted.norm()).item()


if __name__ == "__main__":
    main()
