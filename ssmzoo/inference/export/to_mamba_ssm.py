"""config.json and pytorch_model.bin of mamba_ssm's MambaLMHeadModel.from_pretrained."""

from __future__ import annotations

import json
from pathlib import Path

from ssmzoo.inference.export.language import LAYERS, mamba_ssm_config, norm_eps, why_no_mamba
from ssmzoo.inference.export.source import Source, family_of_class, save_tensors
from ssmzoo.inference.export.tokenizer import save_tokenizer
from ssmzoo.released.family import to_official


def refuse(source: Source) -> str | None:
    if reason := why_no_mamba(source):
        return reason
    if family_of_class(source.cls) not in LAYERS:
        return f"mamba_ssm has the mixers {', '.join(LAYERS.values())} only"
    if norm_eps(source.model) != 1e-5:
        return f"mamba_ssm's norms have epsilon 1e-5, this model's {norm_eps(source.model)}"
    return None


def write(source: Source, folder: Path) -> None:
    state = to_official(family_of_class(source.cls), source.model)
    save_tensors(state, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(mamba_ssm_config(source), indent=2), encoding="utf-8")
    save_tokenizer(source.tokenizer, folder)


def usage(source: Source) -> str:
    return (
        "```python\nfrom mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel\n"
        'model = MambaLMHeadModel.from_pretrained("this/folder", device="cuda")\n```\n'
        "Here `ssmzoo.load_official` reads the folder."
    )
