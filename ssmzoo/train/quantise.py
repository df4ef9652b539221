"""A quantised checkpoint of a trained one: its model as integers, calibrated on the run's own training part."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ssmzoo.adapt.quantise import FORMAT, Settings, quantise, structure
from ssmzoo.checkpoint_files import WEIGHTS, find_checkpoint
from ssmzoo.layers.decoder import LanguageModel
from ssmzoo.layers.quantized import QuantizedEmbedding
from ssmzoo.train import config as configuration
from ssmzoo.train.checkpoint import write_checkpoint
from ssmzoo.zoo import QUANTISATION, load_model

SAMPLES, LENGTH = 128, 512
LEFT_OUT = ("files", "tied", "format", "metrics", "monitor")  # of the manifest: they are the float checkpoint's


class Quantised(NamedTuple):
    """folder that was written; bytes of the weights before and after"""

    folder: Path
    before: int
    after: int


def quantise_checkpoint(
    path: str | Path,
    out: str | Path | None = None,
    settings: Settings | None = None,
    samples: int = SAMPLES,
    length: int | None = None,
    text: str | None = None,
    prefer: str = "best",
) -> Quantised:
    """Write the checkpoint folder of a quantised model, with the same configuration and data.

    path     a run folder or checkpoint of ours | out: folder to be made; None: RUN-MODE beside the run
    samples, length   of the calibration text; length None: that of the training, at most 512
    text     a text file to calibrate on in place of the run's training part

    Raises ValueError for a checkpoint that is quantised already, text that is too short and settings that do not fit,
    FileExistsError for an `out` that is there.
    """
    settings = settings or Settings()
    if samples < 1 or length is not None and length < 1:
        raise ValueError(f"samples = {samples} and length = {length} must be at least 1")
    folder = find_checkpoint(path, prefer)
    out = beside(folder, settings.mode) if out is None else Path(out).expanduser()
    if out.exists():
        raise FileExistsError(f"{out} exists; choose another --out")
    model, manifest = load_model(folder)
    if QUANTISATION in manifest:
        raise ValueError(
            f"{folder} is quantised already ({manifest[QUANTISATION].get('settings', {}).get('mode')}); start from "
            f"{manifest[QUANTISATION].get('made_of', 'the checkpoint it was made of')}"
        )
    shown, about = calibration(model, manifest, samples, length, text)
    made = quantise(model, shown, settings)
    section = {"format": FORMAT, "settings": settings.plain(), "modules": structure(made), "calibration": about}
    section |= {"made_of": str(folder)} | tied(made)
    kept = {key: value for key, value in manifest.items() if key not in LEFT_OUT}
    write_checkpoint(out, made.state_dict(), kept | {QUANTISATION: section})
    return Quantised(out, (folder / WEIGHTS).stat().st_size, (out / WEIGHTS).stat().st_size)


def beside(folder: Path, mode: str) -> Path:
    """runs/mamba/NAME-w4a16 for a checkpoint of runs/mamba/NAME."""
    run = folder.parent.parent if folder.parent.name == "checkpoints" else folder
    return run.with_name(f"{run.name}-{mode}")


def tied(model: nn.Module) -> dict[str, list[str]]:
    """The names of an embedding and a head that share their integers."""
    modules = dict(model.named_modules())
    for name, module in modules.items():
        if isinstance(module, QuantizedEmbedding):
            heads = [n for n, m in modules.items() if m is not module and getattr(m, "weight", None) is module.weight]
            return {"tied": [name, heads[0]]} if heads else {}
    return {}


def calibration(
    model: nn.Module, manifest: dict, samples: int, length: int | None, text: str | None
) -> tuple[list[Tensor], dict[str, Any]]:
    """(samples, what is noted about them): never of the held-out part."""
    node = (manifest.get("config") or {}).get("data")
    if text is not None:
        return of_text(text, manifest, samples, length or LENGTH)
    if not isinstance(node, dict):
        raise ValueError("the checkpoint does not say what it was trained on; give a text with --text FILE")
    node = configuration.plain_config(manifest["config"], "the configuration of the checkpoint")["data"]
    if "tokenizer" in manifest and "tokenizer" in node:
        node = node | {"tokenizer": manifest["tokenizer"], "bpe_vocab_size": None}
    data = configuration.build_node(node, "ssmzoo.data.")
    data.prepare_data()
    data.setup("fit")
    if hasattr(data, "tokens"):
        shown = windows(data.tokens("train"), samples, length or min(LENGTH, data.seq_len))
        return shown, {"of": "training part", "fingerprint": data.fingerprint, **figures(shown)}
    shown = batches(data.train_dataloader(), samples, isinstance(model, LanguageModel), length)
    return shown, {"of": "training part", **figures(shown)}


def of_text(path: str, manifest: dict, samples: int, length: int) -> tuple[list[Tensor], dict[str, Any]]:
    from ssmzoo.data.text_tokenizer import from_dict

    if "tokenizer" not in manifest:
        raise ValueError("--text needs a model with a tokenizer; this checkpoint has none")
    try:
        content = Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as UTF-8 text: {error}") from None
    ids = np.array(from_dict(manifest["tokenizer"]).encode(content))
    shown = windows(ids, samples, length)
    return shown, {"of": Path(path).name, **figures(shown)}


def windows(ids: np.ndarray, samples: int, length: int) -> list[Tensor]:
    """`samples` windows (length), evenly spread; fewer where the text is short."""
    length = min(length, len(ids))
    samples = min(samples, len(ids) // max(1, length))
    starts = torch.linspace(0, max(0, len(ids) - length), max(1, samples)).long().tolist()
    return [torch.from_numpy(ids[s : s + length].astype(np.int64)) for s in starts] if samples else []


def batches(loader, samples: int, language: bool, length: int | None) -> list[Tensor]:
    """Rows of a training loader: token ids (l) each, or images (1 c y x)."""
    shown: list[Tensor] = []
    for batch in loader:
        key = next((k for k in ("input_ids", "image", "lq") if k in batch), None)
        if key is None:
            raise ValueError(
                f"calibration knows batches with input_ids, image or lq (photographs); these have {', '.join(batch)}"
            )
        shown += [row[:length] for row in batch[key]] if language else list(batch[key].split(1))
        if len(shown) >= samples:
            break
    return shown[:samples]


def figures(shown: Sequence[Tensor]) -> dict[str, int]:
    return {"samples": len(shown), "values": sum(s.numel() for s in shown)}
