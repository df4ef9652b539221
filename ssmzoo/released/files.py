"""Reading files of weights: safetensors, and torch's pickles without running anything from them."""

from __future__ import annotations

import zipfile
from pathlib import Path

import torch
from torch import Tensor


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged or does not fit; the message says which and what to do."""


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Tensors of a .safetensors, .pth, .pt, .bin or .ckpt file, or of a folder that holds such files.

    Pickles are read with `weights_only=True`: no code from the file runs. Nested containers that training scripts use
    (`state_dict`, `model`, `model_state_dict`, `params_ema`, `params`) are opened. Raises CheckpointError.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise CheckpointError(f"no checkpoint at {path}")
    if path.is_dir():
        files = sorted(path.glob("*.safetensors")) or sorted(
            p for e in ("bin", "pth", "pt") for p in path.glob(f"*.{e}")
        )
        if not files:
            raise CheckpointError(f"{path} holds no .safetensors, .bin, .pth or .pt file")
        return {key: value for file in files for key, value in read_state_dict(file).items()}
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        refuse_zip_bomb(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except (OSError, RuntimeError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{path} cannot be read as a checkpoint (cut off or damaged?): {error}") from None
    except Exception as error:  # safetensors and pickle raise types of their own
        reason = (str(error).splitlines() or [""])[0]
        raise CheckpointError(f"{path} was refused: {type(error).__name__}: {reason}") from None
    for key in ("params_ema", "params", "state_dict", "model_state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise CheckpointError(f"{path} does not hold a plain mapping from names to tensors")
    return {key.removeprefix("module."): value for key, value in content.items()}


def refuse_zip_bomb(path: Path) -> None:
    """torch stores tensors uncompressed; a file that unpacks to more than it weighs was not written by torch.save."""
    if not zipfile.is_zipfile(path):
        return  # cut off, or of a form older than zip: torch.load says which
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(entry.file_size for entry in archive.infolist())
    if unpacked > 1.2 * path.stat().st_size + (1 << 20):
        raise CheckpointError(f"{path} would unpack to {unpacked:,} bytes from {path.stat().st_size:,}: refused")
