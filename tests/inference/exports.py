"""Tiny runs of every model of configs/model, as checkpoint folders, for the tests of exports."""

from __future__ import annotations

import inspect
from pathlib import Path

import torch
from models import tiny_images
from models.test_state_contract import NODES as LANGUAGE

from ssmzoo.data.text_tokenizer import train_bpe
from ssmzoo.inference.export.source import Source, read_source
from ssmzoo.presets import build_model
from ssmzoo.train.checkpoint import write_checkpoint

IMAGES = tiny_images.tiny_models()
RUNS = {**{f"{name} (text)": node for name, node in LANGUAGE.items()}, **IMAGES}
TEXTS = ["the selective state space model reads the text token by token", "and never looks back at the text"]


def is_text(name: str) -> bool:
    """Is it a language model, or one that reads symbols (both are walked over)?"""
    return name.endswith(" (text)")


def run(name: str, folder: Path, **overrides) -> Path:
    """A checkpoint folder of the tiny model with random weights, away from the initial ones and zeros."""
    return write(RUNS[name] | overrides, folder, name)


def write(node: dict, folder: Path, name: str = "test", **manifest) -> Path:
    torch.manual_seed(0)
    model = build_model(node).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    content = {
        "model": name,
        "config": {"model": node},
        "metrics": {"val/loss": 1.5},
        "step": 3,
        "git_commit": "abc123",
    }
    content["data"] = {"image_size": 32 if "num_classes" in inspect.signature(type(model)).parameters else 16}
    return write_checkpoint(folder, model.state_dict(), content | manifest)


def source(name: str, folder: Path, **overrides) -> Source:
    return read_source(run(name, folder, **overrides))


def inputs(name: str) -> torch.Tensor:
    """Ids of the tiny vocabulary, or pictures."""
    if is_text(name):
        return torch.randint(RUNS[name].get("input_size", 29), (2, 13))
    return tiny_images.build(RUNS[name])[1]


def outputs(model, x) -> torch.Tensor:
    with torch.no_grad():
        y = model(x)
    return y if isinstance(y, torch.Tensor) else y.logits


def bpe():
    return train_bpe(TEXTS, 290, "<|endoftext|>")
