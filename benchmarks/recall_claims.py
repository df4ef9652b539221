"""The claims about recall and memory, as arms and budgets: what benchmarks/recall.py runs. Nothing is run here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

SEEDS, SEARCH_SEED = (0, 1, 2), 100


class Arm(NamedTuple):
    """name in the tables; overrides of train.py; learning rates to choose from (a single one is taken as it is).

    like    the arm of the claim whose learning rate it takes, in place of rates of its own
    """

    name: str
    overrides: tuple[str, ...]
    rates: tuple[float, ...] = ()
    like: str | None = None


class Claim(NamedTuple):
    """common: overrides of all its runs; search: what the runs that choose a rate do otherwise; after: of the folder of
    a run, what is to be kept of it besides; measure: in place of runs, the same of the folder of runs. seeds: fewer
    than all."""

    common: tuple[str, ...] = ()
    arms: tuple[Arm, ...] = ()
    search: tuple[str, ...] = ()
    after: Callable[[Path], dict] | None = None
    seeds: tuple[int, ...] = SEEDS
    measure: Callable[[Path], dict] | None = None


def sizes(*cases: tuple[int, int]) -> str:
    return str([list(case) for case in cases]).replace(" ", "")


# Multi-query recall: accuracy against bytes of state

MQAR_SIZES = ((16, 2), (16, 4), (32, 8))
RATES = (4e-3, 1e-2)
BASE = 20.0  # of rotary angles: with the usual 10,000 a head that looks one token back takes much longer to form


HOME: dict[str, str] = {}  # family -> the arm on which its rates are tried


def arm(name: str, d: int, words: tuple[str, ...]) -> Arm:
    """Rates are tried at D 64, other arms of the family take what that one chose."""
    family = name.partition(" D")[0]
    home = HOME.setdefault(family, name)
    words = (*words, f"model.d_model={d}")
    return Arm(name, words, RATES) if home == name else Arm(name, words, like=home)


def attention(d: int, taps: int = 0) -> Arm:
    settings = f"{{num_heads:2,rotary_emb_dim:{d // 2},rotary_emb_base:{BASE}{f',d_conv:{taps}' if taps else ''}}}"
    words = ("model=mamba", "model.n_layer=2", "model.layer_pattern=A", f"model.attn_cfg={settings}")
    return arm(f"attention with short convolution D{d}" if taps else f"attention D{d}", d, words)


def dynamic_mask(d: int) -> Arm:
    words = ("model=cheems", "model.layer_pattern=A", "model.n_layer=2", "model.n_heads=2", f"model.d_ff={d}")
    return arm(f"dynamic mask attention D{d}", d, (*words, "model.n_experts=0", f"model.rope_base={BASE}"))


def based(d: int, f: int) -> Arm:
    words = ("model=based", "model.n_layer=2", "model.layer_pattern=CT", "model.n_heads=2", "model.d_ff=256")
    return arm(f"Based D{d} f{f}", d, (*words, f"model.feature_dim={f}"))


def mamba(d: int, n: int) -> Arm:
    return arm(f"Mamba D{d} N{n}", d, ("model=mamba", "model.n_layer=2", f"model.ssm_cfg={{d_state:{n}}}"))


def mamba2(d: int, n: int) -> Arm:
    words = ("model=mamba2", "model.n_layer=2", f"model.ssm_cfg={{d_state:{n},headdim:32}}")
    return arm(f"Mamba-2 D{d} N{n}", d, words)


def delta(d: int) -> Arm:
    words = ("model=gated_deltanet", "model.n_layer=2", "model.num_heads=2", f"model.head_dim={d // 2}")
    return arm(f"Gated DeltaNet D{d}", d, words)


PLAIN = ("optim.weight_decay=0.0", "optim.warmup_steps=100")
WHOLE = (*PLAIN, "callbacks.early_stopping=null")
PATIENT = ("trainer.max_steps=3000",)
MQAR = Claim(
    common=(
        *PLAIN,
        "data=mqar",
        "data.vocab_size=64",
        f"data.train={sizes(*MQAR_SIZES)}",
        f"data.test={sizes(*MQAR_SIZES, (64, 8), (64, 16))}",
        "data.batch_size=16",
        "data.val_samples=64",
        "data.test_samples=128",
        "trainer.max_steps=1600",
        "trainer.val_check_interval=200",
        "callbacks.early_stopping={patience:100,stopping_threshold:0.02}",
    ),
    arms=(
        attention(64, taps=4),
        mamba2(64, 32),
        based(64, 8),
        mamba(64, 16),
        attention(32, taps=4),
        attention(128, taps=4),
        mamba2(64, 8),
        mamba2(64, 128),
        based(64, 4),
        based(32, 8),
        mamba(64, 4),
        mamba(32, 4),
        *(a._replace(overrides=(*a.overrides, *PATIENT)) for a in (attention(64), dynamic_mask(64))),
    ),
)

# Reading twice, and prefixes: two sets with one token in common

SETS = (
    *WHOLE,
    "data=disjoint_sets",
    "data.vocab_size=32",
    f"data.train={sizes((2, 8), (8, 2), (4, 16), (16, 4))}",
    f"data.test={sizes((2, 8), (8, 2), (4, 16), (16, 4))}",
    "data.batch_size=64",
    "data.val_samples=256",
    "trainer.max_steps=400",
    "trainer.val_check_interval=100",
)
NEEDLE = (
    *WHOLE,
    "data=needle",
    f"data.train={sizes((96, 1))}",
    f"data.test={sizes((96, 1), (128, 1))}",
    "data.batch_size=8",
    "data.test_samples=128",
    "trainer.max_steps=800",
    "trainer.val_check_interval=200",
)
READERS = tuple(
    a._replace(rates=(3e-3, 6e-3, 1.2e-2), like=None)
    for a in (mamba(64, 16), mamba2(64, 32), based(64, 8), attention(64, taps=4), delta(64))
)


def reading_twice(arm: Arm) -> Arm:
    words = (*arm.overrides, "task.read_twice=true")
    return Arm(f"{arm.name}, trained to read twice", words, like=arm.name)


JRT = ("model=jrt_rnn", "model.d_model=64", "model.n_layer=2", "model.layer_pattern=CP", "model.n_heads=2",
       "model.d_ff=256", "model.feature_dim=8")  # fmt: skip
TWICE = Claim(SETS, tuple(a for arm in READERS for a in (arm, reading_twice(arm))))
NEEDLES = Claim(NEEDLE, READERS)
PREFIX = Claim(
    SETS,
    (
        Arm("prefix linear attention, prefix read both ways", (*JRT, "task.prefix=true"), RATES),
        Arm("the same, causal", JRT, RATES),
    ),
)

# Birdie's mixture against next tokens alone

GATED = ("model=gated_ssm", "model.d_model=128", "model.d_state=192", "model.n_layer=4")


def objectives(run: Path) -> dict:
    """Of one run: loss of every objective's validation samples, and digits of phone books that are told right, without
    further training."""
    import torch

    from ssmzoo.data.birdie.data import BirdieData
    from ssmzoo.data.recall.data import RecallData
    from ssmzoo.tasks.birdie import Birdie
    from ssmzoo.tasks.recall import Recall
    from ssmzoo.zoo import load_model

    data, book = BirdieData("fixed", seq_len=256), RecallData("phone_book", train=[[4, 1]], test=[[4, 1], [8, 1]])
    data.setup()
    model = load_model(run)[0]
    task = Birdie(model)
    with torch.inference_mode():
        prefixes = [{"prefix": b["prefix"]} if task.bidirectional else {} for b in data.val_dataloader()]
        losses = [float(task.loss_of(b, more)) for b, more in zip(data.val_dataloader(), prefixes)]
    table = Recall(model, prefix=task.bidirectional).cases(book)
    told = {name: round(loss, 4) for name, loss in zip(data.names, losses)}
    return {"told": told | {f"phone book {a}x{b}": table.accuracy((a, b)) for a, b in table.sums}}


BIRDIE = Claim(
    (
        "data=birdie",
        "data.seq_len=256",
        "data.batch_size=8",
        "trainer.max_steps=400",
        "task.sample_tokens=0",
        "trainer.val_check_interval=100",
    ),
    (
        Arm("mixture", (*GATED, "data.mixture=birdie"), (2e-3, 4e-3)),
        Arm("next token", (*GATED, "model.layer_pattern=C", "data.mixture=next_token"), (2e-3, 4e-3)),
    ),
    after=objectives,
)


# Experts

WIDTH = ("model.d_model=128", "model.n_blocks=2")
EXPERTS = Claim(
    (
        "data=text",
        "trainer.max_steps=244",  # 1 million bytes
        "trainer.val_check_interval=61",
        "task.sample_tokens=0",
    ),
    (
        Arm("Mamba", ("model=mamba", "model.d_model=128", "model.n_layer=4"), (4e-3, 8e-3)),
        *(
            Arm(f"MoE-Mamba, {e} experts", ("model=moe_mamba", *WIDTH, f"model.n_experts={e}"), (4e-3, 8e-3))
            for e in (8, 32)
        ),
        Arm("Transformer", ("model=transformer", *WIDTH, "model.n_heads=4"), (2e-3, 4e-3)),
        Arm(
            "Transformer, selective attention",
            ("model=transformer", *WIDTH, "model.n_heads=4", "model.attention=selective"),
            (2e-3, 4e-3),
        ),
        *(
            Arm(
                f"Transformer-MoE, {e} experts",
                ("model=transformer_moe", *WIDTH, "model.n_heads=4", f"model.n_experts={e}"),
                (2e-3, 4e-3),
            )
            for e in (8, 32)
        ),
    ),
)


TEN_MILLION = ("trainer.max_steps=2442", "trainer.val_check_interval=222")
LONG = Claim(  # once, at the rates that a tenth of it chose
    (*EXPERTS.common, *TEN_MILLION),
    tuple(
        a._replace(rates=a.rates[1:])
        for a in EXPERTS.arms
        if a.name
        in ("Mamba", "MoE-Mamba, 8 experts", "MoE-Mamba, 32 experts", "Transformer", "Transformer-MoE, 8 experts")
    ),
    seeds=SEEDS[:1],
)


def decoding(runs: Path) -> dict:
    """Per arm of EXPERTS: bytes of state and CPU seconds of a decoded token behind contexts of several lengths."""
    import time

    import torch

    from ssmzoo import create_model
    from ssmzoo.layers.state import state_bytes

    torch.set_num_threads(1)
    found = {}
    for arm in EXPERTS.arms:
        words = dict(word.split("=") for word in arm.overrides)
        arguments = {k.removeprefix("model."): int(v) for k, v in words.items() if k.startswith("model.")}
        model = create_model(words["model"], vocab_size=256, **arguments).eval()
        rows = {}
        for length in (256, 1024, 4096, 16384):
            token, best = torch.zeros(1, 1, dtype=torch.int64), float("inf")
            with torch.inference_mode():
                state = model(torch.randint(256, (1, length)), logits_to_keep=1).state
                for _ in range(5):
                    started = time.process_time()
                    for _ in range(16):
                        model(token, state)
                    best = min(best, (time.process_time() - started) / 16)
            rows[str(length)] = {"state_bytes": state_bytes(model, length), "seconds": best}
        found[arm.name] = rows
    return {"decoding": found}


CLAIMS = {
    "mqar": MQAR,
    "sets": TWICE,
    "needle": NEEDLES,
    "prefix": PREFIX,
    "birdie": BIRDIE,
    "experts": EXPERTS,
    "ten_million": LONG,
    "decoding": Claim(measure=decoding),
}
