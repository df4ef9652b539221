"""docs/results/restoration.md from the numbers in restoration.json beside it; nothing is measured here."""

from __future__ import annotations

import statistics
from pathlib import Path

HEAD = """# Image restoration, measured

Written by `python benchmarks/restoration.py` (numbers: `restoration.json` beside this page). Photographs are those of
scikit-image and scikit-learn, split by photograph: eight to train on, chelsea, coffee and flower held out. PSNR is the
published protocol's: luma with `scale` pixels of border cut off for super-resolution, RGB for denoising.
"""


def write_page(results: dict, page: Path) -> None:
    sections = [
        _runs(results.get("runs", {})),
        _speed(results.get("speed", {})),
        _claim(results.get("claim", {})),
        _memory(results.get("memory", {})),
    ]
    page.write_text(HEAD + "".join(f"\n{s}\n" for s in sections if s))


def _table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(r) + " |" for r in [head, ["---"] * len(head), *rows])


def _runs(runs: dict) -> str:
    if not runs:
        return ""
    rows, curves = [], []
    for title, r in runs.items():
        if "pictures" in r:
            each = ", ".join(f"{name} {got:.2f} ({base:.2f})" for name, (got, base) in r["pictures"].items())
            rows.append(
                [
                    f"`{title}`",
                    f"{r['psnr']:.2f}",
                    f"{r['baseline_psnr']:.2f}",
                    f"{r['psnr'] - r['baseline_psnr']:+.2f}",
                    f"{r['ssim']:.4f} ({r['baseline_ssim']:.4f})",
                    each,
                    f"{r['cpu_seconds']:.0f}" if r.get("cpu_seconds") else "",
                ]
            )
        if r["points"]:
            curves.append(f"`{title}`, validation by step: " + ", ".join(f"{s}: {p:.2f}" for s, p, _ in r["points"]))
    head = [
        "`python train.py ...`",
        "PSNR (dB)",
        "baseline",
        "gain",
        "SSIM (baseline)",
        "per picture (baseline)",
        "CPU s",
    ]
    table = _table(head, rows)
    return (
        "## Default runs\n\nBaselines: bicubic for super-resolution, scikit-image's non-local means with the "
        "noise level given for denoising (BM3D is ahead of both, see LOG.md), the JPEG itself for JPEG. CPU "
        "seconds are of one thread on a crowded machine, start and validations included.\n\n"
        + "\n\n".join([table, *curves])
    )


def _speed(speed: dict) -> str:
    if not speed:
        return ""
    out = [
        "## Speed on a CPU\n\nMambaIR-light x2 (905,016 parameters) on 320 x 180 pixels, float32, beside a public "
        "window-attention model of its size; medians of interleaved calls after a warm-up. The loop is the scan "
        "as the official code runs it without CUDA, in the same model, called once."
    ]
    for threads, measured in sorted(speed.items()):
        command = (
            f"python benchmarks/restoration.py speed --threads {threads} --loop-rows {measured['loop_rows']} "
            f"--repeats {measured['repeats']}"
        )
        out.append(f"{threads} thread{'s' if threads != '1' else ''}, `{command}`:\n\n" + _times(measured["rows"], 180))
        if measured["loop"]:
            out.append(
                _times(measured["loop"]["rows"], measured["loop_rows"]) + "\n\nLargest difference of the two "
                f"results: {measured['loop']['difference']:.1e}."
            )
    return "\n\n".join(out)


def _times(rows: dict, height: int) -> str:
    ours = next(iter(rows.values()))
    table = [
        [name, f"{cpu:.2f}", f"{wall:.2f}", f"{cpu / ours[0]:.2f}", f"{wall / ours[1]:.2f}"]
        for name, (cpu, wall) in rows.items()
    ]
    return _table([f"320 x {height}", "CPU s", "s", "CPU s over ours", "s over ours"], table)


def _claim(claim: dict) -> str:
    if not claim:
        return ""
    arms: dict[str, dict[int, dict]] = {}
    for key, row in claim.items():
        arm, seed = key.rsplit("/", 1)
        arms.setdefault(arm, {})[int(seed)] = row
    rows = []
    for arm, seeds in arms.items():
        values = [seeds[s]["psnr"] for s in sorted(seeds)]
        spread = f" +- {statistics.stdev(values):.3f}" if len(values) > 1 else ""
        common = sorted(set(seeds) & set(arms.get("mambair", {})))
        gaps = [arms["mambair"][s]["psnr"] - seeds[s]["psnr"] for s in common] if arm != "mambair" else []
        gap = f"{statistics.mean(gaps):+.3f} ({', '.join(f'{g:+.3f}' for g in gaps)})" if gaps else ""
        each = ", ".join(f"{s}: {seeds[s]['psnr']:.3f}" for s in sorted(seeds))
        rows.append(
            [
                arm,
                f"{statistics.mean(values):.3f}{spread}",
                each,
                gap,
                f"{statistics.mean(r['cpu_seconds'] for r in seeds.values()):.0f}",
            ]
        )
    missing = [
        f"{arm} {s}"
        for arm in ("mambair", "swinir", "no channel attention", "no local convolution")
        for s in (0, 1, 2)
        if s not in arms.get(arm, {})
    ]
    todo = f"\n\nNot run yet, so that nothing is concluded: {', '.join(missing)} (arm and seed)." if missing else ""
    steps = next(iter(claim.values()))["steps"]
    base = next(iter(claim.values()))["baseline_psnr"]
    return (
        f"## Does the scan beat windows?\n\n`python benchmarks/restoration.py claim`: x2, {steps} steps of 8 "
        f"patches of 64 pixels each, the default recipe, whole held-out photographs (bicubic: {base:.3f} dB). "
        "`swinir` is the Swin-style twin (0.1 % fewer parameters); the others are MambaIR less one part of its "
        "second branch. Published, after 500,000 steps: MambaIR over SwinIR up to +0.36 dB (x2, Manga109).\n\n"
        + _table(["arm", "Y-PSNR (dB)", "by seed", "MambaIR ahead by (each seed)", "CPU s per run"], rows)
        + (todo or f"\n\n{_verdict(arms)}")
    )


def _verdict(arms: dict[str, dict[int, dict]]) -> str:
    """One sentence on MambaIR and every other arm, by the mean gap of seeds and its standard error, doubled."""
    told = {"ahead": [], "behind": [], "not apart": []}
    for arm, seeds in arms.items():
        gaps = [arms["mambair"][s]["psnr"] - seeds[s]["psnr"] for s in seeds]
        if arm != "mambair":
            mean, off = statistics.mean(gaps), 2 * statistics.stdev(gaps) / len(gaps) ** 0.5
            told["ahead" if mean > off else "behind" if mean < -off else "not apart"].append(f"{arm} ({mean:+.3f} dB)")
    parts = [f"{kind}: {', '.join(names)}" for kind, names in told.items() if names]
    start = "holds" if any("swinir" in n for n in told["ahead"]) else "does not hold at this budget"
    return f"**The scan's claim {start}**: beyond twice the standard error of the gaps MambaIR is {'; '.join(parts)}."


def _memory(memory: dict) -> str:
    rows = [
        [what, r["pixels"], f"{r['peak_gib']:.2f} GiB", f"{r['cpu_seconds']:.0f}", f"{r['seconds']:.0f}"]
        for what, r in memory.items()
    ]
    if not rows:
        return ""
    return (
        "## Memory\n\n`python benchmarks/restoration.py memory`: `ssmzoo restore` on one large photograph, tiles "
        "of 192 pixels, one thread of a crowded machine; `restoration` is the checkpoint beside the notebooks.\n\n"
        + _table(["what", "picture", "peak resident memory", "CPU s", "s"], rows)
    )
