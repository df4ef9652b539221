"""Evaluate a trained model: `python eval.py ckpt=runs/moe_mamba/<name>`; `--help` shows more."""

from ssmzoo.cli.train import evaluate

if __name__ == "__main__":
    evaluate()
