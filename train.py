"""Train a model of the zoo: `python train.py model=moe_mamba`; `--help` shows more."""

from ssmzoo.cli.train import train

if __name__ == "__main__":
    train()
