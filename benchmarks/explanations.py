"""How true explanations are to models, and what they find: python benchmarks/explanations.py [--budget MINUTES]

Twelve small models (images: Vim, Adventurer, VMamba, ViT; next byte of source code, professions, a needle in text:
Mamba, Mamba-2, a transformer) are trained by train.py, three seeds each, then explained by MambaLRP, gradients, hidden
attention or attention and, where there is attention, by the rules of AttnLRP. Claims of MambaLRP (arXiv 2406.07592:
more faithful than the others; finds a bias; sees long-range use) and of hidden attention (arXiv 2403.01590: comparable
with attention). Writes docs/results/explanations.{json,md,png}; what is finished is not repeated.
"""

from __future__ import annotations

import argparse
import random
from argparse import Namespace
from pathlib import Path

import torch
from claim_runs import fill, rows_of, train_once
from explanations_page import write_page

ROOT = Path(__file__).resolve().parent.parent
SUMMARY = ROOT / "docs" / "results" / "explanations.json"
SEEDS, SAMPLES, LENGTH = (0, 1, 2), 24, 96
PLAIN = ("trainer.accelerator=cpu", "data.num_workers=0")
WOMEN = {"nurse": 0.9, "teacher": 0.9, "engineer": 0.1, "pilot": 0.1}  # share of women in the biased text
PLACES = {
    "nurse": ("hospital", "clinic", "ward"),
    "teacher": ("school", "college", "classroom"),
    "engineer": ("factory", "workshop", "plant"),
    "pilot": ("airport", "airfield", "hangar"),
}
NOWHERE = ("town", "city", "village")  # tell no profession
LANGUAGE = {
    "Mamba": ("model=mamba", "model.d_model=64", "model.n_layer=2"),
    "Mamba-2": ("model=mamba2", "model.d_model=64", "model.n_layer=2", "model.ssm_cfg={d_state:32,headdim:32}"),
    "transformer": ("model=mamba", "model.d_model=64", "model.n_layer=2", "model.layer_pattern=A",
                    "model.attn_cfg={num_heads:2,rotary_emb_dim:32,rotary_emb_base:1000,d_conv:4}"),
}  # fmt: skip
IMAGES = {
    "Vim": ("model=vim",),
    "Adventurer": ("model=adventurer",),
    "VMamba": ("model=vmamba",),
    "ViT": ("model=vit",),
}


def steps(count: int) -> tuple[str, ...]:
    return f"trainer.max_steps={count}", f"trainer.val_check_interval={count}"


TEXT = ("data.seq_len=128", "task.sample_tokens=0", "optim.lr=4e-3", "data.val_tokens=8192", *PLAIN)
DATA = {  # name: (models, overrides)
    "digits": (IMAGES, (*steps(120), "data.batch_size=32", *PLAIN)),
    "next byte": (LANGUAGE, (*steps(160), *TEXT)),
    "professions": (LANGUAGE, (*steps(220), "data.path={biased}", *TEXT)),
    "professions, balanced": ({"Mamba": LANGUAGE["Mamba"]}, (*steps(220), "data.path={balanced}", *TEXT)),
    "needle": (
        LANGUAGE,
        (*steps(800), "data=needle", "data.train=[[96,1]]", "data.test=[[96,1]]", "data.batch_size=8",
         "data.test_samples=64", "optim.lr=6e-3", "optim.weight_decay=0.0", "optim.warmup_steps=100",
         "callbacks.early_stopping=null", "trainer.accelerator=cpu"),
    ),
}  # fmt: skip


def sentence(draw: random.Random, job: str, woman: bool, place: str) -> str:
    city = draw.choice(("Rome", "Oslo", "Bern", "Lima"))
    return f"In the {place} of {city}. {'Her' if woman else 'His'} job: {job}\n"


def professions(folder: Path, shares: dict[str, float]) -> None:
    """Forty files of 300 sentences; a third of them name a place that tells nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(40):
        draw = random.Random(number)
        lines = []
        for _ in range(300):
            job = draw.choice(list(WOMEN))
            place = draw.choice(NOWHERE if draw.random() < 1 / 3 else PLACES[job])
            lines.append(sentence(draw, job, draw.random() < shares[job], place))
        (folder / f"{number:02d}.txt").write_text("".join(lines))


def train(arm: str, seed: int, runs: Path) -> dict | None:
    data, model = arm.split(": ")
    models, words = DATA[data]
    folders = {"biased": runs / "biased", "balanced": runs / "balanced"}
    if not folders["balanced"].exists():
        professions(folders["biased"], WOMEN)
        professions(folders["balanced"], dict.fromkeys(WOMEN, 0.5))
    words = [word.format(**folders) if word.startswith("data.path") else word for word in words]
    name = f"{data}-{model}-{seed}".replace(" ", "_").replace(",", "")
    return train_once([*models[model], *words, f"seed={seed}"], runs, name, lambda run: measure(run, data))


def measure(run: Path, data: str) -> dict:
    from ssmzoo.checkpoint_files import find_checkpoint
    from ssmzoo.cli.probe import load_subject
    from ssmzoo.zoo import load_model

    torch.manual_seed(0)
    torch.set_num_threads(1)
    options = dict.fromkeys(("input", "layers", "channels", "positions", "target", "masks"))
    folder = find_checkpoint(run)
    if data in ("digits", "next byte"):
        subject = load_subject(folder, Namespace(batch=SAMPLES, length=LENGTH, max_bytes=2**30, name="", **options))
        return faithful(subject.model, subject.inputs, subject.answers)
    model = load_model(folder)[0]
    if data == "needle":
        return needle(model, load_subject(folder, Namespace(batch=64, length=4096, max_bytes=2**30, **options)).inputs)
    draw = random.Random(1000)
    jobs = [draw.choice(list(WOMEN)) for _ in range(SAMPLES)]
    lines = [sentence(draw, job, draw.random() < WOMEN[job], draw.choice(PLACES[job])) for job in jobs]
    ids = padded([line[: line.index("job: ") + 5] for line in lines])
    return faithful(model, ids, torch.tensor([ord(job[0]) for job in jobs])) | bias(model)


def padded(texts: list[str]) -> torch.Tensor:
    """(b l) bytes, cut in front to the shortest but one word: every text ends where it is read."""
    shortest = min(map(len, texts))
    return torch.tensor([list(text[-shortest:].encode()) for text in texts])


def faithful(model, inputs, answers) -> dict:
    """Delta A by method, over the mean explained logit's size; perturbation areas; and layers in figures."""
    from ssmzoo.probes.entry import enter
    from ssmzoo.probes.explain import (
        ATTENTION_METHODS,
        METHODS,
        attention_layers,
        attention_scores,
        explain,
        token_maps,
    )
    from ssmzoo.probes.faithfulness import area, deletion, perturbation, with_special
    from ssmzoo.probes.lrp_rules import ALL
    from ssmzoo.probes.softmax_attention import Attention

    entry = enter(model, inputs)
    with torch.no_grad():
        logits = entry.logits(entry.values)
        target = logits.argmax(1)
    layers = attention_layers(entry, target)
    scores = {m: explain(entry, target, m, steps=12) for m in METHODS if m not in ATTENTION_METHODS}
    scores |= {m: attention_scores(entry, layers, m) for m in ATTENTION_METHODS}
    if any(isinstance(scan, Attention) for scan in layers.scans):
        scores["attnlrp"] = explain(entry, target, "lrp", on=(*ALL, "attention"))
    tenths = [i / 10 for i in range(1, 10)]
    found = {"delta": {}, "positive": {}, "negative": {}}
    for method, s in scores.items():
        s = with_special(entry, s.detach())
        found["delta"][method] = deletion(entry, s, target, [0.0, *tenths, 1.0]).delta
        positive, negative = perturbation(entry, s, target)
        found["positive"][method], found["negative"][method] = area(tenths, positive), area(tenths, negative)
    found["layers"] = []
    for scan in layers.scans:
        absolute, positive = token_maps(scan, (torch.abs, torch.relu), max(1, len(scan.channels) // 64))
        weights = absolute / absolute.sum(-1, keepdim=True).clamp(min=1e-12)  # (b l l)
        length = weights.shape[-1]
        distance = (torch.arange(length)[:, None] - torch.arange(length)).abs()
        entropy = -(weights * weights.clamp(min=1e-12).log()).sum(-1).mean() / torch.tensor(float(length)).log()
        found["layers"].append(
            {
                "reach": float((weights * distance).sum(-1).mean() / length),
                "entropy": float(entropy),
                "own": float(weights.diagonal(dim1=1, dim2=2).mean()),
                "negative": float(1 - positive.sum() / absolute.sum()),
            }
        )
    if answers is not None:
        found["accuracy"] = 100 * float((target == answers).double().mean())
    return found | {"logit": float(logits.gather(1, target[:, None]).abs().mean())}


@torch.no_grad()
def chances(model, texts: list[str]) -> torch.Tensor:
    """(b 4) probability of every profession's first letter."""
    logits = torch.stack([model(torch.tensor([list(t.encode())])).logits[0, -1] for t in texts])
    return logits.softmax(-1)[:, [ord(job[0]) for job in WOMEN]]


def bias(model) -> dict:
    """What a pronoun changes where the place tells nothing, and what MambaLRP says of the pronoun there."""
    from ssmzoo.probes.entry import enter
    from ssmzoo.probes.explain import explain

    draw, shares, signed, pairs = random.Random(2000), [], [], []
    for place in NOWHERE:
        for _ in range(4):
            line = sentence(draw, "nurse", True, place)
            asked = line[: line.index("job: ") + 5]
            pairs.append((asked, asked.replace("Her", "His")))
    she, he = (chances(model, [pair[i] for pair in pairs]) for i in (0, 1))
    typical = [i for i, share in enumerate(WOMEN.values()) if share > 0.5]
    for texts, letters in (([p[0] for p in pairs], "nt"), ([p[1] for p in pairs], "ep")):
        for text in texts:
            entry = enter(model, torch.tensor([list(text.encode())]))
            with torch.no_grad():
                logits = entry.logits(entry.values)[0]
            target, other = (
                torch.tensor(
                    [max((ord(c) for c in "ntep" if (c in letters) == wanted), key=lambda c: float(logits[c]))]
                )
                for wanted in (True, False)
            )
            r = (explain(entry, target, "lrp") - explain(entry, other, "lrp"))[0].detach()
            pronoun = r[-9:-6]
            shares.append(float(pronoun.abs().sum() / r.abs().sum()))
            signed.append(float(pronoun.sum() > 0))
    return {
        "effect": 100 * float((she[:, typical].sum(1) - he[:, typical].sum(1)).mean()),
        "pronoun": 100 * sum(shares) / len(shares),
        "towards": 100 * sum(signed) / len(signed),
        "chance": 100 * sum(3 / len(asked) for asked, _ in pairs) / len(pairs),
    }


def needle(model, rows: torch.Tensor) -> dict:
    """Where the relevance of the first digit asked for lies, by method: on the digit that the needle has?"""
    from ssmzoo.probes.entry import enter
    from ssmzoo.probes.explain import METHODS, explain
    from ssmzoo.probes.faithfulness import deletion

    texts = [bytes(row.tolist()) for row in rows]
    begin = b"\nThe number of "
    kept = []
    for text in texts:
        first, last = text.index(begin), text.rindex(begin)
        if last > first:
            kept.append((text[: text.index(b" is ", last) + 4], text.index(b" is ", first) + 4))
    width = min(len(text) for text, _ in kept)
    kept = [(text[-width:], at - len(text) + width) for text, at in kept]
    kept = [(text, at) for text, at in kept if at >= 0]
    ids, at = torch.tensor([list(text) for text, _ in kept]), torch.tensor([a for _, a in kept])
    answer = ids.gather(1, at[:, None])[:, 0]
    entry = enter(model, ids)
    with torch.no_grad():
        target = entry.logits(entry.values).argmax(1)
    right = target == answer
    found = {"accuracy": 100 * float(right.double().mean()), "delta": {}, "needle": {}, "top": {}}
    found["distance"] = float((ids.shape[1] - at).double().mean())
    for method in METHODS:
        try:
            scores = explain(entry, target, method, steps=12).detach()
        except ValueError:
            continue
        found["delta"][method] = deletion(entry, scores, target, [i / 10 for i in range(11)]).delta
        if right.any():
            s, where = scores[right].abs(), at[right]
            found["needle"][method] = 100 * float((s.gather(1, where[:, None])[:, 0] / s.sum(1)).mean())
            s[:, -1] = 0  # the token that is read
            found["top"][method] = 100 * float((s.argmax(1) == where).double().mean())
    return found | {"chance": 100 / ids.shape[1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=float("inf"), help="minutes")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "explanations")
    parser.add_argument("--page-only", action="store_true")
    arguments = parser.parse_args()
    if not arguments.page_only:
        keys = [(f"{data}: {model}", seed) for seed in SEEDS for data, (models, _) in DATA.items() for model in models]
        fill(SUMMARY, arguments.runs.resolve(), keys, train, arguments.budget)
    write_page(rows_of(SUMMARY), SUMMARY.parent)


if __name__ == "__main__":
    main()
