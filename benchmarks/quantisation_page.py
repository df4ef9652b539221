"""docs/results/quantisation.md and its figure, from the numbers of benchmarks/quantisation.py."""

from __future__ import annotations

from pathlib import Path

from quantisation import RECALL, TEXT, VARIANTS

from ssmzoo.adapt.quantise import MODES

TOP = """# Quantisation: what fewer bits cost

Written by `python benchmarks/quantisation.py` (every number: `quantisation.json` beside this page). Each model was
quantised as `ssmzoo quantise RUN --mode MODE` does it, with 64 samples of its own training part, and is judged on the
same held-out text (65,536 bytes), in bits per byte. *small*: the runs under notebooks/checkpoints; the others: default
runs of the embedded text with the steps that stand below. All are small and trained for minutes: they say which step
matters, not what a model of billions loses. Speeds are ratios of interleaved runs of `generate`, measured with
`OMP_NUM_THREADS=1` in CPU time; every mode takes one call per token, from ids to logits.
[docs/quantisation.md](../quantisation.md) says what the modes are.
"""

PUBLISHED = """
Published for Quamba2-8B in W4A8 (Chiang et al. 2025, arXiv 2503.22879): 1.6 points of accuracy lost on average, 4x less
memory, 1.3x faster prefill and 3x faster generation, with integer kernels of a GPU. The bytes agree with what stands
above; the speed is a matter of kernels (`ssmzoo bench`), the losses are those of small models.
"""


IMAGES = """
## Image models

`python benchmarks/quantised_images.py`: w8a8 of all linear layers, random weights, one image, one thread. The second
column bounds what faster products could give; the third is what they give with the backend that served here.

"""


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def titles(found: dict) -> list[str]:
    """The models of text that were measured."""
    return [key.partition("/")[0] for key in found if key.endswith("/float32") and not key.startswith(RECALL)]


def modes(found: dict) -> str:
    head = ["model", "mode", "bits per byte", "against float32", "bytes", "share", "tokens/s, float32 = 1"]
    rows = []
    for title in titles(found):
        base = found.get(f"{title}/float32")
        times = found.get(f"{title}/seconds", {})
        for mode in ("float32", *MODES):
            one = found.get(f"{title}/{mode}")
            if one is None or base is None:
                continue
            rate = f"{times['float32'] / times[mode]:.2f}" if times else ""
            rows.append(
                [title, mode, f"{one['bits_per_byte']:.3f}", f"{one['bits_per_byte'] - base['bits_per_byte']:+.3f}"]
                + [f"{one['bytes']:,}", f"{one['bytes'] / base['bytes']:.1%}", rate]
            )
    return table(head, rows)


def recall(found: dict) -> str:
    rows = [
        [mode, f"{100 * found[f'{RECALL}/{mode}']['accuracy']:.1f} %", f"{found[f'{RECALL}/{mode}']['bytes']:,}"]
        for mode in ("float32", *MODES)
        if f"{RECALL}/{mode}" in found
    ]
    return (
        "\n## Recall\n\nAccuracy on fresh sequences of the trained sizes (`data=mqar`).\n\n"
        + table(["mode", "accuracy", "bytes"], rows)
        if rows
        else ""
    )


def steps(found: dict) -> str:
    parts = []
    for title in titles(found):
        base = found.get(f"{title}/float32")
        rows = []
        for name in VARIANTS:
            cells = [found.get(f"{title}/{mode}/{name}") for mode in ("w4a16", "w4a8", "w8a8")]
            if any(cells):
                rows.append(
                    [name, *("" if c is None else f"{c['bits_per_byte'] - base['bits_per_byte']:+.3f}" for c in cells)]
                )
        if rows:
            parts.append(
                f"\n{title} (float32: {base['bits_per_byte']:.3f})\n\n"
                + table(["steps", "w4a16", "w4a8", "w8a8"], rows)
            )
    return (
        "\n## Which step costs the loss\n\nBits per byte above float32; a cell is empty where a step does not matter.\n"
        + "".join(parts)
        if parts
        else ""
    )


def images(found: dict) -> str:
    """What 8-bit products could give image models."""
    rows = [
        [key.partition("/")[2], f"{one['linear']:.0%}", f"{one['time']:.2f}", f"{one['distance']:.4f}"]
        for key, one in found.items()
        if key.startswith("images/")
    ]
    head = ["model", "time in linear layers", "time of w8a8, float32 = 1", "distance of the output"]
    return IMAGES + table(head, rows) if rows else ""


def missing(found: dict) -> str:
    """What the command measures and this page does not have yet."""
    names = [f"the default {title}" for title in TEXT if f"{title}/float32" not in found]
    names += [] if f"{RECALL}/float32" in found else ["recall accuracy"]
    names += [] if any(key.count("/") == 2 for key in found) else ["the ablation by step"]
    return f"\nNot measured yet: {', '.join(names)} (the command goes on where the .json ends).\n" if names else ""


def draw(found: dict, out: Path) -> None:
    """Loss against bytes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4))
    for title in titles(found):
        points = {m: found[f"{title}/{m}"] for m in ("float32", *MODES) if f"{title}/{m}" in found}
        if not points:
            continue
        ordered = sorted(points.items(), key=lambda item: item[1]["bytes"])
        (line,) = axes.plot(
            [p["bytes"] / 1e6 for _, p in ordered], [p["bits_per_byte"] for _, p in ordered], "o-", label=title
        )
        for mode, p in ordered:
            axes.annotate(
                mode, (p["bytes"] / 1e6, p["bits_per_byte"]), fontsize=7, xytext=(3, 3), textcoords="offset points"
            )
    axes.set_xscale("log")
    axes.set_xlabel("megabytes of weights")
    axes.set_ylabel("bits per byte, held-out text")
    axes.legend()
    figure.tight_layout()
    figure.savefig(out / "quantisation.png", dpi=110)
    plt.close(figure)


def write(found: dict, out: Path) -> None:
    trained = ", ".join(
        f"{t} {found[f'{t}/float32']['step']}" for t in (*titles(found), RECALL) if f"{t}/float32" in found
    )
    text = f"{TOP}\nSteps of training: {trained}.\n\n## Modes\n\n{modes(found)}\n"
    text += (
        "![loss against bytes](quantisation.png)\n"
        + recall(found)
        + steps(found)
        + images(found)
        + missing(found)
        + PUBLISHED
    )
    (out / "quantisation.md").write_text(text, encoding="utf-8")
    draw(found, out)
