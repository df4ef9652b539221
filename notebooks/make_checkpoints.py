"""Train the small models that the notebooks look into (a few minutes on a laptop), weights and manifest only.

    python notebooks/make_checkpoints.py [language image]
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from ssmzoo.train.checkpoint import find_checkpoint, read_manifest, read_weights, write_checkpoint

HERE = Path(__file__).parent
RECIPES = {
    "image": ["model=vim", "model.embed_dim=32", "model.depth=3", "trainer.max_steps=330",
              "trainer.val_check_interval=110"],
    "language": ["model=mamba", "model.d_model=64", "model.n_layer=3", "data.seq_len=128", "trainer.max_steps=500",
                 "trainer.val_check_interval=250"],
}


def keep(run: Path, name: str) -> Path:
    """The best checkpoint of a run, without what only training needs."""
    manifest = read_manifest(find_checkpoint(run))
    kept = {key: manifest[key] for key in ("model", "versions", "git_commit", "data", "metrics", "tokenizer", "step",
                                           "epoch")
            if key in manifest}
    config = manifest["config"] | {"runs_dir": "runs", "name": name}
    return write_checkpoint(HERE / "checkpoints" / name, read_weights(run), kept | {"config": config})


def main(names: list[str]) -> None:
    for name in names or list(RECIPES):
        with tempfile.TemporaryDirectory() as runs:
            command = [sys.executable, str(HERE.parent / "train.py"), *RECIPES[name], f"runs_dir={runs}",
                       f"name={name}"]
            subprocess.run(command, check=True, cwd=HERE.parent)
            print(keep(next(Path(runs).glob(f"*/{name}")), name))


if __name__ == "__main__":
    main(sys.argv[1:])
