"""GGUF files of Mamba and Mamba-2 (llama.cpp's) as tensors under the names of mamba_ssm, integers written out.

The names within a block, and the forms: A itself in place of its logarithm, no unit axes, a row per group in the norm.
Read by the `gguf` package, which maps the file into memory and runs nothing of it.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ARCHITECTURES = ("mamba", "mamba2")
BLOCK = {  # names within a block: ours, which are mamba_ssm's, and llama.cpp's
    "norm.weight": "attn_norm.weight",
    "mixer.in_proj.weight": "ssm_in.weight",
    "mixer.conv1d.weight": "ssm_conv1d.weight",
    "mixer.conv1d.bias": "ssm_conv1d.bias",
    "mixer.x_proj.weight": "ssm_x.weight",
    "mixer.dt_proj.weight": "ssm_dt.weight",
    "mixer.dt_proj.bias": "ssm_dt.bias",
    "mixer.dt_bias": "ssm_dt.bias",
    "mixer.A_log": "ssm_a",
    "mixer.D": "ssm_d",
    "mixer.norm.weight": "ssm_norm.weight",
    "mixer.out_proj.weight": "ssm_out.weight",
}
OUTSIDE = {
    "backbone.embedding.weight": "token_embd.weight",
    "backbone.norm_f.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
EPS = "attention.layer_norm_rms_epsilon"


def open_gguf(path: Path):
    """(reader, architecture, {key without the architecture: value}); ValueError for what is no Mamba."""
    if importlib.util.find_spec("gguf") is None:
        raise ValueError("gguf is not installed (pip install gguf)")
    from gguf import GGUFReader

    reader = GGUFReader(path)
    field = reader.fields.get("general.architecture")
    arch = None if field is None else field.contents()
    if arch not in ARCHITECTURES:
        raise ValueError(f"its architecture is {arch!r}; read are {' and '.join(ARCHITECTURES)}")
    own = {key: f for key, f in reader.fields.items() if key.startswith(f"{arch}.")}
    return reader, arch, {key.removeprefix(f"{arch}."): f.contents() for key, f in own.items()}


def gguf_config(path: Path) -> dict[str, Any]:
    """What shapes of tensors do not tell, as fields of mamba_ssm's MambaConfig."""
    try:
        _, arch, fields = open_gguf(path)
        if arch == "mamba":
            return {"ssm_cfg": {"layer": "Mamba1"}}
        heads = int(fields["ssm.time_step_rank"])
        mixer = {"d_state": int(fields["ssm.state_size"]), "ngroups": int(fields["ssm.group_count"])}
        return {"ssm_cfg": {"layer": "Mamba2", **mixer, "headdim": int(fields["ssm.inner_size"]) // heads}}
    except Exception:  # a damaged file: reading its tensors says so
        return {}


def read_gguf(path: Path) -> dict[str, Tensor]:
    """Tensors in fp32 under mamba_ssm's names; ValueError for another architecture, names and settings that we lack."""
    reader, arch, fields = open_gguf(path)
    from gguf.quants import dequantize

    eps = fields.get(EPS, 1e-5)
    if abs(eps - 1e-5) > 1e-8:
        raise ValueError(f"its norms add {eps:g} to the mean square; mamba_ssm's names know 1e-5 only")
    found = {t.name: torch.from_numpy(dequantize(t.data, t.tensor_type).copy()) for t in reader.tensors}
    outside = {theirs: ours for ours, theirs in OUTSIDE.items()}
    inside = {theirs: ours for ours, theirs in BLOCK.items() if ours != dead_name(arch)}
    state = {}
    for name, tensor in found.items():
        number, _, leaf = name.removeprefix("blk.").partition(".")
        ours = outside.get(name)
        if ours is None and name.startswith("blk.") and number.isdigit() and leaf in inside:
            ours = f"backbone.layers.{int(number)}.{inside[leaf]}"
        if ours is None:
            raise ValueError(f"its tensor {name!r} is none of a {arch} model")
        state[ours] = form(ours, tensor, arch)
    return state


def dead_name(arch: str) -> str:
    """The bias of the time step has one name there and two here."""
    return "mixer.dt_proj.bias" if arch == "mamba2" else "mixer.dt_bias"


def form(name: str, tensor: Tensor, arch: str) -> Tensor:
    """A tensor in the form that mamba_ssm stores."""
    if name.endswith("A_log"):
        tensor = torch.log(-tensor)
    if name.endswith("conv1d.weight"):
        return tensor[:, None]
    if arch == "mamba2" and name.endswith(("A_log", ".D", "mixer.norm.weight")):
        return tensor.flatten()
    return tensor
