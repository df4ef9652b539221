"""Stands in for `python` and `ssmzoo` in the tested blocks of the pages: the same command, at a small size.

python tests/small.py python|ssmzoo ARGUMENTS
"""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SIZES = {  # what makes a kind of data small, by the room of its class
    "text": "data.seq_len=32 data.batch_size=2 data.val_tokens=256 task.sample_tokens=4",
    "birdie": "data.seq_len=256 data.batch_size=2 data.val_rows=2 task.controller.updates=2",
    "images": "data.num_workers=0 data.batch_size=8",
    "images_fewshot": "data.num_workers=0",
    "photos": "data.batch_size=1 data.patch_size=48 data.val_crop=48",
    "formal": "data.batch_size=8 data.test_length=40 data.val_samples=8 data.test_samples=4",
    "graphs": "data.batch_size=4",
    "motion": "data.clips=2 data.val_clips=1 data.clip_frames=184 data.batch_size=2",
    "questions": "data.batch_size=4 task.decoder_steps=2 task.align_steps=1",
    "series": "data.batch_size=4 task.vus_window=5",
    "recall": "data.batch_size=4 data.val_samples=8 data.test_samples=8",
}
LOOP = "trainer.val_check_interval=2 trainer.limit_val_batches=1 trainer.log_every_n_steps=1 trainer.accelerator=cpu"


def small(arguments: list[str]) -> list[str]:
    """The arguments of train.py with few steps on little data; what a page types about sizes of data stays."""
    typed = dict(a.lstrip("+").partition("=")[::2] for a in arguments if "=" in a)
    if any(a.startswith(("--cfg", "--help")) for a in arguments):
        return arguments
    if "resume" in typed:
        return [a if not a.startswith("trainer.max_steps=") else "trainer.max_steps=3" for a in arguments]
    kept = [a for a in arguments if not a.startswith(("trainer.max_steps=", "trainer.val_check_interval="))]
    if "config" in typed:
        return kept
    added = [a for a in SIZES.get(kind(typed), "").split() if fits(a, typed)]
    return [*kept, "trainer.max_steps=2", *LOOP.split(), *(a for a in added if a.partition("=")[0] not in typed)]


def kind(typed: dict[str, str]) -> str:
    """The room in ssmzoo/data of the data that a command chooses."""
    from ssmzoo.presets import config_dir, read_model_config

    name = typed.get("data") or read_model_config(typed.get("model", "moe_mamba").split(",")[0]).get("data", "text")
    while name:
        text = (config_dir() / "data" / f"{name}.yaml").read_text(encoding="utf-8")
        if found := text.partition("_target_: ssmzoo.data.")[2].partition(".")[0]:
            return found
        name = text.partition("defaults: [")[2].partition(",")[0]  # the file that it inherits
    return ""


def fits(override: str, typed: dict[str, str]) -> bool:
    """Samples are printed by the task of language models alone."""
    return not (override.startswith("task.sample_tokens") and typed.get("task", "language") != "language")


def main(program: str, *arguments: str) -> None:
    arguments = list(arguments)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    if program == "ssmzoo" and arguments[:1] not in (["train"], ["eval"]):
        command = [sys.executable, "-m", "ssmzoo.cli.main", *arguments]
    elif program == "ssmzoo":
        command = [sys.executable, str(ROOT / f"{arguments[0]}.py"), *arguments[1:]]
    else:
        command = [sys.executable, *arguments]
    if command[1:2] in (["train.py"], [str(ROOT / "train.py")]):
        command = [sys.executable, str(ROOT / "train.py"), *small(command[2:])]
    sys.stdout.flush()
    os.execve(sys.executable, command, environment)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main(*sys.argv[1:])
