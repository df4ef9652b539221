"""What benchmarks/gpu.py found, as CSV files, a page and a picture. Needs no GPU."""

from __future__ import annotations

import csv
from pathlib import Path

COLUMNS = {
    "card": ("copy_gb_s", "product_tflop_s", "memory_gb"),
    "check": ("operator", "variant", "dtype", "backend", "out", "grad", "verdict"),
    "times": ("operator", "dtype", "length", "pass", "backend", "ms", "gb_s", "share_of_copy", "times_torch"),
    "train": ("model", "batch", "ms", "items_per_s", "unit", "peak_gb", "share_of_product", "loss", "verdict"),
    "decode": ("model", "batch", "how", "tokens_per_s", "gb_s", "share_of_copy", "peak_gb"),
}
TITLES = {
    "card": "The card",
    "check": "Errors against the float64 reference",
    "times": "Operators",
    "train": "Training steps",
    "decode": "Decoding",
}


def newest(rows: list[dict], machine: str) -> dict[str, list[dict]]:
    """Rows of this machine by section, of every part those of its last run."""
    own = [r for r in rows if r.get("machine") == machine]
    last = {(r["section"], r["part"]): r["run"] for r in own if "run" in r}
    kept = [r for r in own if "run" in r and r["run"] == last[r["section"], r["part"]]]
    return {section: [r for r in kept if r["section"] == section] for section in COLUMNS}


def write(rows: list[dict], out: Path, machine: str) -> None:
    found = newest(rows, machine)
    for section, values in found.items():
        if values:
            with (out / f"gpu_{section}.csv").open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, COLUMNS[section], extrasaction="ignore", restval="")
                writer.writeheader()
                writer.writerows(values)
    ends = {(r["section"], r["part"]): r for r in rows if r.get("machine") == machine and "ended" in r}
    (out / "gpu.md").write_text(page(found, ends, machine), encoding="utf-8")
    draw(found, out / "gpu.png")


def page(found: dict[str, list[dict]], ends: dict, machine: str) -> str:
    """The tables; of the checks those lines that have numbers, the rest is in the CSV file."""
    lines = ["# GPU kernels, measured", "", f"`python benchmarks/gpu.py` on {machine}.", ""]
    for section, rows in found.items():
        rows = [r for r in rows if section != "check" or "out" in r]
        if not rows:
            continue
        columns = COLUMNS[section]
        lines += [f"## {TITLES[section]}", "", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
        lines += ["| " + " | ".join(str(r.get(c, "")) for c in columns) + " |" for r in rows]
        lines.append("")
    bad = [f"{s} {p}: ended {r['ended']}" for (s, p), r in ends.items() if r["ended"] != "well"]
    spent = sum(r["seconds"] for r in ends.values())
    return "\n".join([*lines, *bad, f"{len(ends)} parts in {spent:.0f} s."]) + "\n"


def draw(found: dict[str, list[dict]], path: Path) -> None:
    """Times of the operators by length, training steps, decoding by batch."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    kinds = list(dict.fromkeys((r["operator"], r["pass"]) for r in found["times"]))
    panels = len(kinds) + bool(found["train"]) + bool(found["decode"])
    if not panels:
        return
    figure, axes = plt.subplots(-(-panels // 3), 3, figsize=(13, 3 * -(-panels // 3)), squeeze=False)
    spots = iter(axes.flat)
    for kind in kinds:
        axis, lines = next(spots), {}
        for r in found["times"]:
            if (r["operator"], r["pass"]) == kind:
                lines.setdefault((r["backend"], r["dtype"]), []).append((r["length"], float(r["ms"])))
        for (backend, dtype), points in lines.items():
            axis.loglog(*zip(*points), "o-", label=f"{backend} {dtype}", markersize=3)
        axis.set_title(f"{kind[0]}: {kind[1]}", fontsize=9)
        axis.set_xlabel("length (tokens) or rows", fontsize=8)
        axis.set_ylabel("ms", fontsize=8)
        axis.legend(fontsize=6)
    if found["train"]:
        axis, timed = next(spots), [r for r in found["train"] if r.get("ms")]
        axis.barh([r["model"] for r in timed], [float(r["ms"]) for r in timed])
        axis.set_title("training step", fontsize=9)
        axis.set_xlabel("ms", fontsize=8)
        axis.tick_params(labelsize=7)
    if found["decode"]:
        axis, lines = next(spots), {}
        for r in found["decode"]:
            lines.setdefault((r["model"], r["how"]), []).append((r["batch"], float(r["tokens_per_s"])))
        for (model, how), points in lines.items():
            axis.loglog(*zip(*points), "o-", label=f"{model}, {how}", markersize=3)
        axis.set_title("decoding", fontsize=9)
        axis.set_xlabel("batch", fontsize=8)
        axis.set_ylabel("tokens/s", fontsize=8)
        axis.legend(fontsize=6)
    for axis in spots:
        axis.axis("off")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
