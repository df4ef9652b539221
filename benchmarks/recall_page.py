"""docs/results/recall.md and its figures from the runs in recall.json beside it; nothing is run here."""

from __future__ import annotations

import math
import statistics
from pathlib import Path

from recall_claims import BIRDIE, CLAIMS, MQAR, READERS, SEARCH_SEED, Claim
from recall_results import COLOURS, Results, at, by_size, each, figure, other, spread, table, trained

HEAD = """# Recall and memory, in small

Written by `python benchmarks/recall.py` (numbers of every run: `recall.json` beside this page; what the arms are:
`benchmarks/recall_claims.py`). Every run is `train.py` in a process of its own, on one thread of a CPU that many others
used. Each arm (in the first table: one arm of each family; in the second: the arm that reads once) takes the learning
rate with the lowest validation loss on a seed of its own, 100. Accuracies are in %, mean and standard deviation over
seeds. The published figures stand for models and budgets a hundred to a million times larger: they say which way a
comparison should go, not which number to expect.
"""


# Multi-query recall

FAMILIES = ("attention with short convolution", "attention", "dynamic mask attention", "Based", "Mamba", "Mamba-2")


def family(arm: str) -> str:
    return next(f for f in sorted(FAMILIES, key=len, reverse=True) if arm.startswith(f"{f} D"))


def mqar(rows: list[dict], page: Path) -> str:
    r = Results(rows, "mqar")
    if not r:
        return ""
    names = r.names(MQAR)
    cases = sorted(r.arms[names[0]][0]["cases"], key=by_size)
    learnt = set(r.arms[names[0]][0]["trained"])
    largest = max(learnt, key=by_size)
    held = {name: r.arms[name][0]["state_bytes"][largest] for name in names}
    names = sorted(names, key=lambda name: (FAMILIES.index(family(name)), held[name]))
    memory, heat = page.with_name("recall_memory.png"), page.with_name("recall_heat.png")
    figure(memory, lambda axes: draw_memory(axes, r, names, held, largest), (8.5, 4))
    shown = [
        n
        for n in ("attention with short convolution D64", "Based D64 f8", "Mamba D64 N16", "Mamba-2 D64 N128")
        if n in names
    ]
    figure(heat, lambda axes: draw_heat(axes, r, shown, cases, learnt), (3.3 * len(shown), 3.2), ncols=len(shown),
           squeeze=False, sharey=True)  # fmt: skip
    body = [
        [name, f"{held[name]:,}", f"{r.arms[name][0]['lr']:g}", each(r.over_seeds(name, trained)),
         *(f"{r.mean(name, at(case)):.0f}" for case in cases),
         f"{r.mean(name, lambda row: row['cpu_seconds']):.0f}"]
        for name in names
    ]  # fmt: skip
    head = ["arm", f"bytes of state at {largest}", "rate", "trained sizes",
            *(case + ("" if case in learnt else " (not trained)") for case in cases), "CPU s"]  # fmt: skip
    return "\n\n".join(
        [
            "## Multi-query recall against bytes of state",
            "`data=mqar`, 64 tokens, two layers of width D, N the state per channel (Mamba-2: per head), f the "
            "features of "
            "Based (which, like dynamic mask attention, has feed-forwards; the others have none), all sizes mixed; "
            "training "
            "ends once the validation loss is below 0.02. In brackets every seed; a column *length x pairs* holds "
            "the mean "
            f"accuracy at that size. {r.budget(MQAR)}",
            table(head, body),
            f"![accuracy against bytes of state]({memory.name})",
            f"![accuracy by length and pairs]({heat.name})",
            "\n".join(f"- {line}" for line in verdicts_mqar(r, names, held, largest)),
        ]
    )


def verdicts_mqar(r: Results, names: list[str], held: dict[str, int], largest: str) -> list[str]:
    score = {name: r.mean(name, trained) for name in names}
    of = {f: [n for n in names if family(n) == f] for f in FAMILIES}
    lines = []
    attentions = of["attention with short convolution"] + of["attention"]
    if attentions:
        reached = [n for n in attentions if score[n] >= 99]
        verdict = "Holds." if len(reached) == len(attentions) else "Holds in part" if reached else "Falls short"
        if verdict != "Holds.":
            verdict += (
                f": 99 % or more in {len(reached)} of {len(attentions)} arms; the others had not finished learning."
            )
        lines.append(
            "**Attention solves it at every width** (published: yes, D 64 to 512 in Zoology). Here "
            + ", ".join(f"{n} {score[n]:.1f} %" for n in attentions)
            + f". {verdict}"
        )
    pairs = [(b, interpolated(held[b], [(held[m], score[m]) for m in of["Mamba"]])) for b in of["Based"]]
    pairs = [(b, m) for b, m in pairs if m is not None]
    if pairs:
        ahead = [b for b, m in pairs if score[b] > m]
        lines.append(
            "**Based is above Mamba at equal bytes of state** (published: figure 2 of Based; in text 25.7 against "
            "17.3 % "
            "on SWDE at 360M). Mamba's accuracy between its measured sizes is interpolated over the logarithm of "
            "bytes: "
            + "; ".join(f"{b} {score[b]:.1f} against {m:.1f} %" for b, m in pairs)
            + f". {'Holds' if len(ahead) == len(pairs) else 'Does not hold' if not ahead else 'Holds in part'} "
            f"({len(ahead)} of {len(pairs)})."
        )
    if len(of["Mamba-2"]) > 1:
        values = [score[n] for n in of["Mamba-2"]]
        rising = all(b > a for a, b in zip(values, values[1:]))
        lines.append(
            "**Mamba-2 gains with d_state** (published: yes, 16 to 64 to 256). "
            + ", ".join(f"{n.rpartition(' ')[2]} {score[n]:.1f} %" for n in of["Mamba-2"])
            + (
                ". Holds."
                if rising
                else ". Not throughout: a seed that learns late weighs more than the size of the state."
            )
        )
    twins = [(n, n.removeprefix("dynamic mask ")) for n in of["dynamic mask attention"]]
    twins = [(n, a) for n, a in twins if a in score]
    if not twins:
        lines.append("**Dynamic mask attention is above attention at D 64**: not run.")
    else:
        reach = {n: statistics.stdev(r.over_seeds(n, trained) or [0, 0]) for pair in twins for n in pair}
        ahead = [n for n, a in twins if score[n] - score[a] > reach[n] + reach[a]]
        behind = [n for n, a in twins if score[a] - score[n] > reach[n] + reach[a]]
        unlearnt = all(score[n] < 50 for pair in twins for n in pair)
        lines.append(
            "**Dynamic mask attention is above attention at D 64** (published: 100 against 68 % at length 256, 79 "
            "against 65 at 512). "
            + "; ".join(f"{n.rpartition(' ')[2]}: {score[n]:.1f} against {score[a]:.1f} %" for n, a in twins)
            + (". Undecided: no seed of either found the task in these steps." if unlearnt else
               ". Holds." if len(ahead) == len(twins) else ". Does not hold here." if behind else
               ". Undecided: within the spread of the seeds.")
        )  # fmt: skip
    return lines


def interpolated(held: int, points: list[tuple[int, float]]) -> float | None:
    """Accuracy at so many bytes between measured points, linear in the logarithm; None outside of them."""
    points = sorted(points)
    for (a, low), (b, high) in zip(points, points[1:]):
        if a <= held <= b:
            return low + (high - low) * math.log(held / a) / math.log(b / a)
    return None


def draw_memory(ax, r: Results, names: list[str], held: dict[str, int], largest: str) -> None:
    """A line per family over its arms of width 64; arms of other widths stand alone."""
    for f, colour in zip(FAMILIES, COLOURS):
        mine = [n for n in names if family(n) == f]
        for same in ([n for n in mine if " D64" in n], [n for n in mine if " D64" not in n]):
            values = [r.over_seeds(n, trained) for n in same]
            error = [statistics.stdev(v) if len(v) > 1 else 0.0 for v in values]
            x, y = [held[n] for n in same], [statistics.mean(v) for v in values]
            at_home = " D64" in "".join(same)
            style = dict(marker="o", label=f"{f} D64") if at_home else dict(marker="s", linestyle="", mfc="white")
            if same:
                ax.errorbar(x, y, error, capsize=3, color=colour, **style)
            for n, a, b in zip(same, x, y) if not at_home else ():
                ax.annotate(n.removeprefix(f + " "), (a, b), (5, -11), textcoords="offset points", fontsize=7)
    ax.set(xscale="log", xlabel=f"bytes of state a sequence, at length x pairs {largest}", ylim=(0, 103))
    ax.set_ylabel("accuracy over the trained sizes (%)")
    ax.set_title("multi-query recall against memory (bars: one standard deviation over seeds)", fontsize=9)
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))


def draw_heat(axes, r: Results, names: list[str], cases: list[str], learnt: set[str]) -> None:
    lengths, pairs = (sorted({by_size(c)[i] for c in cases}) for i in (0, 1))
    for ax, name in zip(axes[0], names):
        image = [[math.nan] * len(lengths) for _ in pairs]
        for case in cases:
            x, y = lengths.index(by_size(case)[0]), pairs.index(by_size(case)[1])
            value = image[y][x] = r.mean(name, at(case))
            ax.text(x, y, f"{value:.0f}", ha="center", va="center", color="white" if value < 60 else "black")
            if case in learnt:
                frame = dict(xy=(x - 0.47, y - 0.47), width=0.94, height=0.94, fill=False, edgecolor="#D55E00", lw=2)
                ax.add_patch(type(ax.patch)(**frame))
        ax.imshow(image, cmap="viridis", vmin=0, vmax=100, origin="lower", aspect="auto")
        ax.set_xticks(range(len(lengths)), lengths)
        ax.set_yticks(range(len(pairs)), pairs)
        ax.set(xlabel="length", title=name)
    axes[0][0].set_ylabel("pairs (framed: trained)")


# Reading twice


def twice(rows: list[dict]) -> str:
    sets, recall, needle = (Results(rows, claim) for claim in ("sets", "mqar", "needle"))
    if not sets:
        return ""
    body, gains, taught = [], {"the sets": [], "mqar": [], "the needle": []}, []
    parts = dict(zip(gains, (sets, recall, needle)))
    for arm in READERS:
        for name, part in parts.items():
            if arm.name in part.arms:
                gains[name].append(part.mean(arm.name, other) - part.mean(arm.name, trained))
        again = sets.over_seeds(f"{arm.name}, trained to read twice", trained)
        if again:
            taught.append((arm.name, statistics.mean(again) - sets.mean(arm.name, trained)))
        cells = [spread(part.over_seeds(arm.name, how)) for part in parts.values() for how in (trained, other)]
        body.append([arm.name, *cells[:2], spread(again), *cells[2 : 6 if needle else 4]])
    head = ["model", "sets, once", "sets, twice", "sets, trained to read twice", "mqar, once", "mqar, twice"]
    head += ["needle, once", "needle, twice"] if needle else []
    said = ", ".join(f"{statistics.mean(g):+.1f} points on {name} ({len(g)} models)" for name, g in gains.items() if g)
    holds = statistics.mean(gains["the sets"]) > 1
    why = (
        "Holds."
        if holds
        else "Does not hold here: a model that was trained on one bench, read once, has never met a repeated context, "
        "which language models have."
    )
    helped = [name for name, gain in taught if gain > 0]
    if taught:
        why += (
            f" Trained to read twice, with the same steps, {len(helped)} of {len(taught)} are better on the sets, "
            f"{statistics.mean(gain for _, gain in taught):+.1f} points on average "
            f"(most: {max(taught, key=lambda t: t[1])[0]}, {max(gain for _, gain in taught):+.1f})."
        )
    not_run = "" if needle else " The needle in the embedded text (`--only needle`) has not been run."
    return "\n\n".join(
        [
            "## Reading twice (JRT-Prompt)",
            "Accuracy over the trained sizes. *twice*: the model of the column before, whose context is shown twice, "
            "without training (`eval.py task.read_twice=true`). Sets: `data=disjoint_sets`, one token of two sets is "
            f"in both. {sets.budget(Claim(arms=CLAIMS['sets'].arms))}{not_run}",
            table(head, body),
            "- **Reading the context twice raises recall without training** (published: +11.0 ± 1.3 points, mean over "
            f"language models and tasks). Here {said}. {why}",
        ]
    )


# Prefixes


def prefix(rows: list[dict]) -> str:
    r = Results(rows, "prefix")
    names = ["prefix linear attention, prefix read both ways", "the same, causal"]
    if not all(name in r.arms for name in names):
        return ""
    cases = sorted(r.arms[names[0]][0]["cases"], key=by_size)
    learnt = r.arms[names[0]][0]["trained"]
    body = [
        [name, f"{r.arms[name][0]['lr']:g}", spread(r.over_seeds(name, trained)),
         *(spread(r.over_seeds(name, at(case)), 0) for case in cases)]
        for name in names
    ]  # fmt: skip
    head = ["arm", "rate", "trained sizes", *(c + ("" if c in learnt else " (not trained)") for c in cases)]
    gap = r.mean(names[0], trained) - r.mean(names[1], trained)
    pairs = list(zip(*(r.over_seeds(name, trained) for name in names)))
    searched = [max(trained(x) for x in r.all if x["arm"] == n and x["seed"] == SEARCH_SEED) for n in names]
    ahead = sum(a > b for a, b in pairs)
    verdict = (
        f"The prefix is ahead in {ahead} of {len(pairs)} seeds; on the seed that chose the rates {searched[0]:.1f} "
        "against "
        f"{searched[1]:.1f} %. "
    )
    clear = ahead == len(pairs) > 1 and searched[0] > searched[1]
    verdict += "Holds." if clear else "Undecided at this budget: seeds differ by more than the arms."
    return "\n\n".join(
        [
            "## Prefix linear attention against its causal twin",
            "`data=disjoint_sets`, columns *first x second set*; the same weights and initial values, two layers of "
            "width "
            f"64. {r.budget(Claim())}",
            table(head, body),
            "- **Reading the prefix in both directions helps recall** (published at 360M: 43.3 against 30.4 % on "
            "SWDE, 82.0 "
            f"against 50.3 on FDA). Here {gap:+.1f} points over the trained sizes. {verdict}",
        ]
    )


# Birdie


def birdie(rows: list[dict]) -> str:
    r = Results(rows, "birdie")
    if set(r.arms) != {"mixture", "next token"}:
        return ""
    kinds = ("selective_copying", "infilling", "copying", "next_token")
    books = [key for key in r.arms["mixture"][0]["told"] if key.startswith("phone book")]

    def told(kind: str) -> list[list[float]]:
        """Of either arm, per seed."""
        return [r.over_seeds(arm, lambda row: mean_of(row["told"], kind)) for arm in ("mixture", "next token")]

    def digits(book: str) -> list[list[float]]:
        return [r.over_seeds(arm, lambda row: 100 * row["told"][book]) for arm in ("mixture", "next token")]

    body = [[kind.replace("_", " "), *(spread(v, 3) for v in told(kind))] for kind in kinds]
    body += [[f"{book}, digits right in %", *map(spread, digits(book))] for book in books]
    gaps = {kind: statistics.mean(a) - statistics.mean(b) for kind, (a, b) in zip(kinds, map(told, kinds))}
    better = [kind.replace("_", " ") for kind in kinds[:3] if gaps[kind] < 0]
    most = max(statistics.mean(v) for book in books for v in digits(book))
    return "\n\n".join(
        [
            "## Birdie's mixture against next tokens alone",
            "`gated_ssm`, width 128, four layers, trained on text by the mixture (prefixes read in both directions) or "
            "on next tokens alone (causal), and judged on held-out samples of the objectives without further training: "
            f"loss in nats per token of the answer. {r.budget(BIRDIE)}",
            table(["", "mixture", "next token"], body),
            "- **Training on the mixture gives copying and retrieval that next tokens alone do not** (published at "
            "1.4B: 100 % of single phone numbers against none, infilling of stories 42.5 against 33.1 %). The mixture "
            f"is better on {', '.join(better) or 'none of the three'} ("
            + ", ".join(f"{kind.replace('_', ' ')} {gap:+.2f} nats" for kind, gap in gaps.items())
            + "), of which it has practised all and the other the last. "
            + (
                f"Neither retrieves: {most:.0f} % of the phone book's digits at most (10 % is chance). No answer at "
                "this budget; the paper's fine-tuning on each task has not been run."
                if most < 15
                else f"Phone book: up to {most:.0f} % of the digits."
            ),
        ]
    )


def mean_of(losses: dict[str, float], kind: str) -> float:
    return statistics.mean(v for name, v in losses.items() if name.startswith(kind) and not name.startswith("phone"))


# Experts


def experts(rows: list[dict], page: Path) -> str:
    short = compared(
        rows,
        "experts",
        page.with_name("recall_experts.png"),
        "MoE-Mamba again: learning rates tuned per arm, Transformers beside it",
        "width 128, two pairs of mixer and feed-forward (Mamba: four layers), the better of two rates.",
    )
    long = compared(
        rows,
        "ten_million",
        page.with_name("recall_ten_million.png"),
        "The same over ten times the bytes, once",
        "rates as above, one seed.",
    )
    return "\n\n".join([*short, *long, *decoding(rows)])


def compared(rows: list[dict], claim: str, png: Path, title: str, how: str) -> list[str]:
    """Of a claim about experts: the table of its arms, their curves and the verdict."""
    r = Results(rows, claim)
    names = r.names(CLAIMS[claim])
    if not names:
        return []
    loss = {name: r.over_seeds(name, lambda row: row["curve"][-1][1]) for name in names}
    mean_curve = {
        name: [
            (points[0][0], statistics.mean(p[1] for p in points))
            for points in zip(*(row["curve"] for row in r.arms[name]))
        ]
        for name in names
    }

    def draw(ax) -> None:
        for name, colour in zip(names, COLOURS):
            x, y = zip(*mean_curve[name])
            ax.plot([4096 * s / 1e6 for s in x], y, marker="o", markersize=3, color=colour, label=name)
        ax.set(xlabel="bytes of text read (millions)", ylabel="validation loss (nats per byte)")
        ax.set(yscale="log", title="experts at equal active parameters")
        ax.grid(alpha=0.3, which="both")
        ax.legend(fontsize=8)

    figure(png, draw)
    body, gaps = [], {}
    for name in names:
        dense = "Mamba" if "Mamba" in name else "Transformer"
        ratio = speed_up(mean_curve.get(dense, []), mean_curve[name]) if name != dense else ""
        gap = statistics.mean(loss[name]) - statistics.mean(loss[dense]) if dense in loss and name != dense else None
        if gap is not None and "MoE" in name:
            gaps[name] = gap
        seconds = r.mean(name, lambda row: row["cpu_seconds"])
        body.append([name, f"{r.arms[name][0]['lr']:g}", spread(loss[name], 4), "" if gap is None else f"{gap:+.4f}",
                     ratio, f"{seconds:.0f}"])  # fmt: skip
    pays = [name for name, gap in gaps.items() if gap < 0]
    word = "The experts pay" if len(pays) == len(gaps) else "The experts do not pay" if not pays else "In part"
    read_bytes = max(row["steps"] for name in names for row in r.arms[name]) * 4096
    return [
        f"## {title}",
        f"{read_bytes / 1e6:.2f} million bytes of text a run, {how} {r.budget(CLAIMS[claim])}",
        table(
            ["arm", "rate", "final loss (nats per byte)", "against its dense twin", "steps of the twin to it", "CPU s"],
            body,
        ),
        f"![validation loss against bytes]({png.name})",
        "- **MoE-Mamba needs fewer steps than Mamba** (published: 2.2 times fewer at 25M active parameters with 32 "
        "experts; at 1B tokens 1.10 with 8 and 1.23 with 32). Final loss against the dense twin: "
        f"{', '.join(f'{name} {gap:+.3f} nats' for name, gap in gaps.items())}. {word}.",
    ]


def speed_up(dense: list[tuple[int, float]], experts_curve: list[tuple[int, float]]) -> str:
    """Steps that the dense model needs to the experts' final loss, over theirs."""
    if not dense or not experts_curve:
        return ""
    steps, loss = experts_curve[-1]
    for (a, high), (b, low) in zip(dense, dense[1:]):
        if low <= loss < high:
            return f"{(a + (b - a) * (high - loss) / (high - low)) / steps:.2f}"
    return "not reached" if loss < dense[-1][1] else f"under {dense[0][0] / steps:.2f}"


def decoding(rows: list[dict]) -> list[str]:
    found = next((row["decoding"] for row in rows if "decoding" in row), None)
    if not found:
        return []
    lengths = list(next(iter(found.values())))
    body = [
        [name, *(f"{1 / rows[n]['seconds']:,.0f}" for n in lengths),
         *(f"{rows[n]['state_bytes'] / 1024:,.0f}" for n in lengths)]
        for name, rows in found.items()
    ]  # fmt: skip
    head = [
        "arm",
        *(f"tokens/s behind {int(n):,}" for n in lengths),
        *(f"KiB of state behind {int(n):,}" for n in lengths),
    ]
    mamba, attention = (
        [found[name][n]["seconds"] for n in (lengths[0], lengths[-1])] for name in ("Mamba", "Transformer")
    )
    return [
        "Decoding one token after contexts of several lengths, batch 1, one thread, random weights (CPU time; best "
        "of five "
        "times sixteen tokens):",
        table(head, body),
        f"- From {int(lengths[0]):,} to {int(lengths[-1]):,} tokens of context a decoded token takes "
        f"{mamba[1] / mamba[0]:.2f} "
        f"times as long in Mamba and {attention[1] / attention[0]:.2f} times in the Transformer.",
    ]


def write_page(rows: list[dict], page: Path) -> None:
    parts = [mqar(rows, page), twice(rows), prefix(rows), birdie(rows), experts(rows, page)]
    page.write_text("\n\n".join([HEAD.strip(), *(part for part in parts if part)]) + "\n", encoding="utf-8")
