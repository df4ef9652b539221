"""Train the small models that the notebooks look into (some minutes on a laptop), weights and manifest only.

make checkpoints, or: python notebooks/make_checkpoints.py [language image restoration ...]
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from ssmzoo.checkpoint_files import find_checkpoint, read_manifest, read_weights
from ssmzoo.train.checkpoint import write_checkpoint

HERE = Path(__file__).parent
RECIPES = {
    "image": [
        "model=vim",
        "model.patch_size=4",
        "model.embed_dim=32",
        "model.depth=3",
        "optim.lr=2e-3",
        "trainer.max_steps=330",
        "trainer.val_check_interval=110",
    ],
    "language": [
        "model=mamba",
        "model.d_model=64",
        "model.n_layer=3",
        "data.seq_len=128",
        "trainer.max_steps=500",
        "trainer.val_check_interval=250",
    ],
    "experts": [
        "model=moe_mamba",
        "model.d_model=32",
        "model.n_experts=4",
        "data.seq_len=128",
        "data.batch_size=8",
        "trainer.max_steps=200",
        "trainer.val_check_interval=200",
    ],
    "sd_ssm_D4": ["model=sd_ssm", "data.language=D4", "trainer.max_steps=1500", "trainer.val_check_interval=250"],
    "mamba_D4": [
        "model=mamba",
        "task=formal",
        "data=formal",
        "optim=formal",
        "optim.lr=3e-3",
        "data.language=D4",
        "model.d_model=32",
        "model.n_layer=2",
        "trainer.max_steps=3000",
        "trainer.val_check_interval=500",
    ],
    "restoration": ["model=mambair", "trainer.max_steps=150", "trainer.val_check_interval=150", "+data.val_crop=null"],
    "restoration_swinir": [
        "model=swinir",
        "trainer.max_steps=150",
        "trainer.val_check_interval=150",
        "+data.val_crop=null",
        "seed=1",
    ],
}


def keep(run: Path, name: str) -> Path:
    """The best checkpoint of a run, without what only training needs."""
    manifest = read_manifest(find_checkpoint(run))
    kept = {
        key: manifest[key]
        for key in ("model", "versions", "git_commit", "data", "metrics", "tokenizer", "step", "epoch")
        if key in manifest
    }
    config = manifest["config"] | {"runs_dir": "runs", "name": name}
    return write_checkpoint(HERE / "checkpoints" / name, read_weights(run), kept | {"config": config})


def main(names: list[str]) -> None:
    for name in names or list(RECIPES):
        with tempfile.TemporaryDirectory() as runs:
            command = [
                sys.executable,
                str(HERE.parent / "train.py"),
                *RECIPES[name],
                f"runs_dir={runs}",
                f"name={name}",
            ]
            subprocess.run(command, check=True, cwd=HERE.parent)
            print(keep(next(Path(runs).glob(f"*/{name}")), name))


if __name__ == "__main__":
    main(sys.argv[1:])
