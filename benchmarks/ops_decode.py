"""Cases of benchmarks/ops.py: tokens per second of models of 130M parameters, float32 and quantised, beside
transformers and llama.cpp, all with the same random weights; and what reading the weights alone would allow.

llama.cpp comes prebuilt with node-llama-cpp, which npm fetches into a cache folder (SSMZOO_BENCH_CACHE, by default
ssmzoo-bench in the folder for temporary files); its files are written with the gguf package.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import shutil
import statistics
import struct
import subprocess
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
from ops import Case, Missing, clock

import ssmzoo
from ssmzoo.inference.decoding import Decoding
from ssmzoo.inference.generate import prefill as prefill_of
from ssmzoo.layers.quantized import QuantizedEmbedding, QuantizedLinear
from ssmzoo.ops import native
from ssmzoo.ops.quantized_linear import pack_int4

HERE = Path(__file__).resolve().parent
CACHE = Path(os.environ.get("SSMZOO_BENCH_CACHE") or Path(tempfile.gettempdir()) / "ssmzoo-bench")
TOKENS, AGREE, GROUP = 32, 32, 128
PROMPT = [0, 0, 0, 0]
LOUD = 30.0  # out_proj times this: the layers outweigh the embedding, so that greedy text varies
FILES = ("f32", "q8_0", "q4_0")  # llama.cpp's kinds


def model_of(name: str):
    torch.manual_seed(0)
    model = ssmzoo.create_model(name).eval().requires_grad_(False)
    for block in model.backbone.layers:
        block.mixer.out_proj.weight *= LOUD
    return model


@torch.no_grad()
def integers(weight: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales to nearest, in groups of GROUP columns."""
    (e, d), top = weight.shape, 7 if bits == 4 else 127
    m = -(-d // GROUP)
    padded = torch.nn.functional.pad(weight, (0, m * GROUP - d)).view(e, m, GROUP)
    scale = padded.abs().amax(-1) / top + 1e-12
    codes = (padded / scale[..., None]).round().clamp(-top, top).view(e, -1)[:, :d].to(torch.int8)
    return (pack_int4(codes) if bits == 4 else codes), scale


def quantised(name: str, bits: int):
    """All linear maps, the embedding and the head."""
    model = model_of(name)
    for parent in list(model.modules()):
        for child, linear in list(parent.named_children()):
            if type(linear) is torch.nn.Linear:
                new = QuantizedLinear(
                    linear.in_features, linear.out_features, bits, GROUP, bias=linear.bias is not None
                )
                new.weight, new.scale = integers(linear.weight, bits)
                if linear.bias is not None:
                    new.bias = linear.bias.detach()
                setattr(parent, child, new)
    table = QuantizedEmbedding(*model.backbone.embedding.weight.shape, bits, GROUP)
    table.weight, table.scale = model.lm_head.weight, model.lm_head.scale
    model.backbone.embedding = table
    return model


@torch.inference_mode()
def greedy(model, batch: int = 1, tokens: int = TOKENS) -> tuple[list[int], float]:
    """(tokens of the first sequence, tokens per second of all together: the median step), as `generate` decodes them"""
    logits, state = prefill_of(model, torch.tensor([PROMPT] * batch))
    decoding, times, found = Decoding(model, state), [], []
    for _ in range(tokens):
        start = clock()
        token = logits.argmax(-1)
        found.append(int(token[0]))
        logits = decoding(token)
        times.append(clock() - start)
    return found, batch / statistics.median(times)


def ours(build, batch: int = 1):
    return lambda: functools.partial(lambda model: greedy(model, batch)[1], build())


def prefill(build, length: int = 512):
    """Prompt tokens per second."""

    def prepare():
        model, ids = build(), torch.randint(0, 50277, (1, length), generator=torch.Generator().manual_seed(0))

        @torch.inference_mode()
        def run() -> float:
            times = []
            for _ in range(5):
                start = clock()
                model(ids, logits_to_keep=1)
                times.append(clock() - start)
            return length / statistics.median(times)

        return run

    return prepare


def reading(name: str):
    """Tokens per second if a token took no longer than reading the float32 weights once."""

    def prepare():
        with torch.device("meta"):
            size = 4 * sum(p.numel() for p in ssmzoo.create_model(name).parameters())
        return lambda: read_bandwidth() / size

    return prepare


def read_bandwidth(size: int = 1 << 30) -> float:
    """Bytes per second at which all threads together read memory, the best of ten passes."""
    read, missing = native.kernel("ssmzoo_read")
    if missing:
        raise Missing(missing)
    block, sums, times = torch.ones(size // 4), torch.empty(size >> 20), []
    native.gather([block])  # as weights are
    for _ in range(10):
        start = clock()
        read(struct.pack("4q", block.data_ptr(), size // 4, sums.data_ptr(), torch.get_num_threads()))
        times.append(clock() - start)
    assert sums.sum() == size // 4
    return size / min(times)


def transformers(name: str):
    def prepare():
        from ssmzoo._torchvision import make_importable

        make_importable()
        from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM

        model = model_of(name)
        vocab, sizes = model.lm_head.weight.shape[0], {"hidden_size": 768, "num_hidden_layers": 24}
        if name.startswith("mamba2"):
            more = {"num_heads": 24, "head_dim": 64, "state_size": 128, "n_groups": 1, "tie_word_embeddings": True}
            other = Mamba2ForCausalLM(Mamba2Config(vocab_size=vocab, **sizes, **more))
        else:
            other = MambaForCausalLM(MambaConfig(vocab_size=vocab, **sizes))

        @torch.inference_mode()
        def run() -> float:
            def seconds(tokens: int) -> float:
                start = clock()
                options = {"do_sample": False, "max_new_tokens": tokens, "min_new_tokens": tokens, "pad_token_id": 0}
                prompt = torch.tensor([PROMPT])
                other.eval().generate(prompt, attention_mask=torch.ones_like(prompt), **options)
                return clock() - start

            short = seconds(4)
            return TOKENS / (seconds(4 + TOKENS) - short)

        return run

    return prepare


def llama(name: str, kind: str, tokens: int = TOKENS + 5) -> dict:
    """What decode_llama.mjs prints. Raises Missing with the reason."""
    for tool in "node", "npm":
        if shutil.which(tool) is None:
            raise Missing(f"{tool} is not installed")
    home = CACHE / "llama"
    if not (home / "node_modules/node-llama-cpp").is_dir():
        home.mkdir(parents=True, exist_ok=True)
        (home / "package.json").write_text('{"name": "peers", "private": true}')
        done = subprocess.run(["npm", "install", "node-llama-cpp@3"], cwd=home, capture_output=True, text=True)
        if done.returncode:
            raise Missing(f"npm could not fetch node-llama-cpp: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
    file = write_gguf(name, kind)
    command = ["node", str(HERE / "decode_llama.mjs"), str(home), str(file), str(tokens), str(torch.get_num_threads())]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise Missing(f"llama.cpp failed: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def write_gguf(name: str, kind: str) -> Path:
    """The file that `ssmzoo ckpt export --to gguf` writes, without words: only numbers go in and out."""
    if importlib.util.find_spec("gguf") is None:
        raise Missing("gguf is not installed (pip install gguf)")
    from ssmzoo.inference.export import to_gguf

    file = CACHE / f"{name}.{kind}.gguf"
    if file.exists():
        return file
    model = model_of(name)
    source = SimpleNamespace(model=model, name=name, cls=type(model), tokenizer=None)
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        to_gguf.write(source, Path(folder), kind)
        (Path(folder) / "model.gguf").replace(file)
    return file


def llama_speed(name: str, kind: str):
    return lambda: lambda: llama(name, kind)["speed"]


def agreeing(name: str):
    """How many of llama.cpp's float32 tokens are ours, before the first that is not."""

    def run() -> float:
        theirs = llama(name, "f32", AGREE)["tokens"]
        mine, _ = greedy(model_of(name), tokens=AGREE)
        return next((i for i, (a, b) in enumerate(zip(mine, theirs)) if a != b), AGREE)

    return lambda: run


def cases(name: str) -> list[Case]:
    floats, bytes_, nibbles = (
        functools.partial(model_of, name),
        *(functools.partial(quantised, name, b) for b in (8, 4)),
    )
    speeds = {
        "ssmzoo float32": ours(floats),
        "reading float32 weights, nothing else": reading(name),
        "ssmzoo int8": ours(bytes_),
        "ssmzoo int4": ours(nibbles),
        "transformers float32": transformers(name),
        **{f"llama.cpp {kind}": llama_speed(name, kind) for kind in FILES},
    }
    sizes = {"float32": (floats, (1, 2, 4, 8)), "int8": (bytes_, (1, 8)), "int4": (nibbles, (1, 8))}
    batch = {
        f"ssmzoo {kind}, {b} sequence{'s' * (b > 1)}": ours(build, b)
        for kind, (build, counts) in sizes.items()
        for b in counts
    }
    prompts = {"float32": prefill(floats), "int8": prefill(bytes_), "int4": prefill(nibbles)}
    more = {"by_name": True, "limit": 1200}
    return [
        Case(f"decode {name}, 1 sequence", speeds, unit="tokens/s", **more),
        Case(f"decode {name}, batches", batch, unit="tokens/s", **more),
        Case(f"decode {name}, prompt of 512 tokens", prompts, unit="tokens/s", **more),
        Case(
            f"decode {name}, greedy tokens that agree",
            {"all": lambda: lambda: AGREE, "ssmzoo and llama.cpp f32": agreeing(name)},
            unit="tokens",
            **more,
        ),
    ]


CASES = [*cases("mamba_130m"), *cases("mamba2_130m")]
