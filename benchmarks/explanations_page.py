"""docs/results/explanations.md and its figures, from what benchmarks/explanations.py measured."""

from __future__ import annotations

import statistics
from pathlib import Path

SPOKEN = {
    "lrp": "LRP",
    "attnlrp": "AttnLRP",
    "gradient_x_input": "gradient x input",
    "integrated_gradients": "integrated gradients",
    "raw": "raw",
    "rollout": "rollout",
    "attribution": "attribution",
}
HAVE_ATTENTION = ("ViT", "transformer")


def spread(values: list[float]) -> tuple[float, float]:
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def told(values: list[float], form: str = ".2f") -> str:
    mean, deviation = spread(values)
    return f"{mean:{form}} ± {deviation:{form}}"


def table(rows: dict[str, list[dict]], key: str, form: str, lowest: bool = False) -> list[str]:
    """A line per arm, a column per method; the best mean is bold."""
    lines = ["| data: model | " + " | ".join(SPOKEN.values()) + " |", "|---" * (len(SPOKEN) + 1) + "|"]
    for arm, found in rows.items():
        methods = [m for m in SPOKEN if all(m in f[key] for f in found)]
        means = {m: statistics.mean(f[key][m] for f in found) for m in methods}
        best = (min if lowest else max)(means, key=means.get)
        cells = [told([f[key][m] for f in found], form) if m in means else "" for m in SPOKEN]
        cells = [f"**{c}**" if m == best else c for m, c in zip(SPOKEN, cells)]
        lines.append(f"| {arm} ({len(found)}) | {' | '.join(cells)} |")
    return lines


def most_faithful(rows: dict[str, list[dict]]) -> str:
    """Verdict over pairs of data and state-space models, and over transformers."""

    def ahead(found: list[dict], method: str, over: list[str]) -> str:
        means = {m: spread([f["delta"][m] for f in found]) for m in (method, *over)}
        if all(means[method][0] - means[m][0] > means[method][1] + means[m][1] for m in over):
            return "beyond the spread"
        return "in the mean" if all(means[method][0] > means[m][0] for m in over) else "not"

    others = [m for m in SPOKEN if m not in ("lrp", "attnlrp")]
    scans = {arm: found for arm, found in rows.items() if arm.split(": ")[1] not in HAVE_ATTENTION}
    ranks = [ahead(found, "lrp", [m for m in others if m in found[0]["delta"]]) for found in scans.values()]
    first = sum(rank != "not" for rank in ranks)
    verdict = "holds" if first == len(ranks) else "holds in part" if first > len(ranks) / 2 else "does not hold"
    lines = [
        f"MambaLRP's claim {verdict} here: it has the largest Delta A of all methods in {first} of {len(ranks)} pairs "
        f"of data and state-space model, in {ranks.count('beyond the spread')} of them beyond the spread."
    ]
    both = [f for arm, f in rows.items() if all("attnlrp" in x["delta"] for x in f)]
    if both:
        better = sum(
            statistics.mean(f["delta"]["attnlrp"] for f in found) > statistics.mean(f["delta"]["lrp"] for f in found)
            for found in both
        )
        lines.append(
            f"On attention AttnLRP's shares are ahead of weights as constants in {better} of {len(both)} pairs, in the "
            "mean."
        )
    return " ".join(lines)


def against_attention(rows: dict[str, list[dict]]) -> str:
    """Hidden attention beside attention, each by the share of LRP's Delta A that its best map reaches."""
    parts = []
    for data, twin in (("digits", "ViT"), ("next byte", "transformer"), ("professions", "transformer")):
        reach = {}
        for arm, found in rows.items():
            if arm.split(": ")[0] == data:
                lrp = statistics.mean(f["delta"]["lrp"] for f in found)
                best = max(statistics.mean(f["delta"][m] for f in found) for m in ("raw", "rollout", "attribution"))
                reach[arm.split(": ")[1]] = best / lrp
        if twin in reach and len(reach) > 1:
            rest = ", ".join(f"{model} {share:.2f}" for model, share in reach.items() if model != twin)
            parts.append(f"{data}: {rest}; {twin} {reach[twin]:.2f}")
    vim, vit = rows.get("digits: Vim"), rows.get("digits: ViT")
    verdict = ""
    if vim and vit:
        raw, twin = (statistics.mean(f["positive"]["raw"] for f in found) for found in (vim, vit))
        ours, theirs = (
            max(statistics.mean(f["negative"][m] for f in found) for m in ("raw", "rollout", "attribution"))
            for found in (vim, vit)
        )
        verdict = (
            f"On digits Vim's raw attention is {'better' if raw < twin else 'not better'} on positive perturbation "
            f"({raw:.1f} % beside ViT's {twin:.1f} %), and the transformer's best map is "
            f"{'better' if theirs > ours else 'not better'} on negative ({theirs:.1f} beside {ours:.1f} %): the "
            f"published directions {'hold' if raw < twin and theirs > ours else 'are not both found'} here. "
        )
    return (
        verdict
        + "Delta A of the best of raw, rollout and attribution over LRP's, so that models compare: "
        + ". ".join(parts)
        + "."
    )


def layers(rows: dict[str, list[dict]]) -> list[str]:
    lines = ["| data: model | weight on itself, % | reach, % of the length | entropy, % of its largest | negative, % |"]
    lines.append("|---" * 5 + "|")
    for arm, found in rows.items():
        depth = min(len(f["layers"]) for f in found)
        cells = []
        for key in ("own", "reach", "entropy", "negative"):
            by_layer = [100 * statistics.mean(f["layers"][i][key] for f in found) for i in range(depth)]
            cells.append(", ".join(f"{v:.0f}" for v in by_layer))
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return lines


def about_bias(rows: dict[str, list[dict]]) -> list[str]:
    lines = [
        "| text, model | her less his: chance of nurse or teacher, points | share of relevance on the pronoun, % |"
    ]
    lines[0] += " it speaks for the explained profession, % of sentences |"
    lines.append("|---" * 4 + "|")
    for arm, found in rows.items():
        lines.append(
            f"| {arm} ({len(found)}) | {told([f['effect'] for f in found], '.1f')} | "
            f"{told([f['pronoun'] for f in found], '.1f')} | {told([f['towards'] for f in found], '.0f')} |"
        )
    biased, balanced = rows.get("professions: Mamba"), rows.get("professions, balanced: Mamba")
    if biased and balanced:
        (a, s), (b, t) = (spread([f["pronoun"] for f in found]) for found in (biased, balanced))
        verdict = "holds" if a - b > s + t else "is undecided" if a > b else "does not hold"
        lines += [
            "",
            f"That MambaLRP uncovers a bias {verdict} here: {a:.1f} % of the relevance that parts the two kinds of "
            f"profession lies on the pronoun of Mamba's biased text, {b:.1f} % on the balanced one's (its share of the "
            f"bytes: {biased[0]['chance']:.1f} %).",
        ]
    return lines


def about_needle(rows: dict[str, list[dict]]) -> list[str]:
    lines = ["| model | right, % | share of |relevance| on the digit, % | it is the most relevant byte, % of answers |"]
    lines[0] = lines[0].replace("|relevance|", "relevance")
    lines.append("|---" * 4 + "|")
    knows = {arm: [f for f in found if f["accuracy"] > 25] for arm, found in rows.items()}
    for arm, found in rows.items():
        kept, cells = knows[arm], ["", ""]
        if kept:
            methods = [m for m in SPOKEN if all(m in f["needle"] for f in kept)]
            cells = [
                ", ".join(f"{SPOKEN[m]} {statistics.mean(f[key][m] for f in kept):.0f}" for m in methods)
                for key in ("needle", "top")
            ]
        lines.append(f"| {arm} ({len(kept)} of {len(found)}) | {told([f['accuracy'] for f in found], '.0f')} | "
                     f"{cells[0]} | {cells[1]} |")  # fmt: skip
    kept = [f for arm, found in knows.items() if "transformer" not in arm for f in found]
    if kept:
        share, chance = (
            statistics.mean(f["needle"]["lrp"] for f in kept),
            statistics.mean(f["chance"] for f in kept),
        )
        away = statistics.mean(f["distance"] for f in kept)
        verdict = "holds" if share > 3 * chance else "does not hold"
        lines += [
            "",
            f"Long-range use seen by MambaLRP {verdict} here: {share:.1f} % of the relevance lies on the one byte that "
            f"answers, {away:.0f} bytes back on average ({chance:.1f} % if it were even).",
        ]
    return lines


def draw(rows: dict[str, list[dict]], folder: Path) -> str:
    from ssmzoo.probes import figures

    figure, axes = figures.canvas(1, 2, (6.2, 4.4))
    bars, lines = axes[0, 0], axes[0, 1]
    for place, method in enumerate(SPOKEN):
        for i, found in enumerate(rows.values()):
            if all(method in f["delta"] for f in found):
                values = [f["delta"][method] / f["delta"]["lrp"] for f in found if f["delta"]["lrp"]]
                bars.plot(
                    statistics.mean(values),
                    i + 0.09 * (place - 3),
                    "o",
                    color=figures.COLOURS[place % len(figures.COLOURS)],
                    label=SPOKEN[method] if f"{method}" not in drawn(bars) else None,
                )
    bars.set_yticks(range(len(rows)), list(rows), fontsize=8)
    bars.invert_yaxis()
    bars.axvline(1, color="grey", linewidth=0.8)
    bars.set(xlabel="Delta A over LRP's", title="faithfulness")
    handles = dict(zip(*reversed(bars.get_legend_handles_labels())))
    bars.legend(handles.values(), handles, fontsize=7)
    bars.grid(axis="x", alpha=0.3)
    for i, (arm, found) in enumerate(rows.items()):
        depth = min(len(f["layers"]) for f in found)
        curve = [100 * statistics.mean(f["layers"][k]["entropy"] for f in found) for k in range(depth)]
        style = "--" if arm.split(": ")[1] in HAVE_ATTENTION else "-"
        lines.plot(range(depth), curve, style, marker="o", label=arm, color=figures.COLOURS[i % len(figures.COLOURS)])
    lines.set(xlabel="scan or attention, by depth", ylabel="entropy of a token's reading (% of its largest)")
    lines.set_title("layers (dashed: attention)")
    lines.legend(fontsize=7)
    lines.grid(alpha=0.3)
    figure.savefig(folder / "explanations.png", dpi=110)
    return "explanations.png"


def drawn(axis) -> set[str]:
    back = {spoken: method for method, spoken in SPOKEN.items()}
    return {back.get(label, label) for label in axis.get_legend_handles_labels()[1]}


def write_page(rows: list[dict], folder: Path) -> Path | None:
    """The page of what is known; rows are those of docs/results/explanations.json."""
    arms: dict[str, list[dict]] = {}
    for row in rows:
        arms.setdefault(row["arm"], []).append(row)
    plain = {arm: found for arm, found in arms.items() if not arm.startswith(("needle", "professions, balanced"))}
    if not plain:
        print("nothing is measured yet")
        return None
    needles = {arm: found for arm, found in arms.items() if arm.startswith("needle")}
    lines = [
        "# Explanations: how true they are, and what they find",
        "",
        "`python benchmarks/explanations.py`, resumable. Mean and standard deviation over the seeds (how many: in",
        "brackets). Small models of 2 to 4 layers, 120 (digits), 160 (next byte of Python's standard library), 220",
        "(professions) and 800 steps (needle) by their default recipes; 24 validation inputs of 96 bytes or a digit",
        "each. Delta A: how much higher the explained logit stays when the least relevant vectors go first than when",
        "the most relevant do, on average over 0 to 100 % removed; higher is more faithful. *raw*, *rollout* and",
        "*attribution* are made of hidden attention, in ViT and the transformer of attention. LRP is MambaLRP; on",
        "attention its rules take the weights as constants, AttnLRP (that of LXT) shares relevance among q, k and v.",
        "",
        "## Faithfulness (MambaLRP, arXiv 2406.07592)",
        "",
        "Published: most faithful over SST-2, Med-BIOS, SNLI, Emotion and ImageNet; figures not verified.",
        "",
        *table(plain, "delta", ".2f"),
        "",
        most_faithful(plain),
        "",
        f"![Faithfulness and layers]({draw(plain, folder)})",
        "",
        "## Hidden attention beside attention (arXiv 2403.01590)",
        "",
        "Published, for Vim-S beside DeiT-S: raw attention better on positive perturbation, the transformer's methods",
        "on negative perturbation. Accuracy for the predicted class, averaged over 10 to 90 % removed; positive: most",
        "relevant first, lower is better.",
        "",
        *table(plain, "positive", ".1f", lowest=True),
        "",
        "Negative: least relevant first, higher is better.",
        "",
        *table(plain, "negative", ".1f"),
        "",
        against_attention(plain),
        "",
        "Layers, by depth: what a token reads by |alpha|, or by attention. Reach is the mean distance of what is",
        "read.",
        "",
        *layers(plain),
        "",
    ]  # fmt: skip
    told_bias = {arm: found for arm, found in arms.items() if arm.startswith("professions")}
    if told_bias:
        lines += [
            "## A bias, found",
            "",
            "Sentences made here: *In the hospital of Rome. Her job: nurse*. Nine of ten nurses and teachers are",
            "women, nine of ten engineers and pilots men; in the balanced text half of each. A third of the sentences",
            "name a place that tells nothing. Asked with such places: the relevance of the likelier stereotypical",
            "profession less that of the likelier other one.",
            "",
            *about_bias(told_bias),
            "",
        ]
    if needles:
        lines += [
            "## Long-range use",
            "",
            "The first digit of a number hidden in 96 bytes of text, asked for at the end; models that answer more",
            "than 25 % (how many of the seeds: in brackets; digits by chance: 10 %).",
            "",
            *about_needle(needles),
            "",
        ]
    path = folder / "explanations.md"
    path.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    print(path)
    return path
