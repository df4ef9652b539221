"""Mamba-2: the Mamba language model around the state-space-duality mixer, alone or with attention layers between.

    x <- x + Mamba2(RMSNorm(x)) for every layer;   logits = W_head RMSNorm(x), W_head tied to the embedding

The mixer and its equations are in layers/mixers/mamba2.py; the skeleton, its initialisation and the attention hybrid
are those of ssmzoo/models/mamba.py. Paper and code agree; the released single-token steps differ from the released
whole-sequence form where a time-step limit is set (they do not clamp), and ours follow the whole-sequence form.
Source: Dao & Gu 2024 (arXiv 2405.21060); state-spaces/mamba modules/{mamba2,mamba2_simple,mha}.py and Hugging Face
transformers models/mamba2 (Apache-2.0) for names, initialisation and checkpoints.
"""

from __future__ import annotations

from ssmzoo.layers.mixers.mamba2 import Mamba2
from ssmzoo.models.mamba import MambaLM


class Mamba2LM(MambaLM):
    """ids (b l) -> ModelOutput(logits (b l v), state, {}). Arguments of MambaLM; `ssm_cfg` are the arguments of
    ssmzoo.layers.mixers.mamba2.Mamba2, whose defaults are the published models' (d_state 128, headdim 64)."""

    mixer = Mamba2
