"""Mamba-3: the Mamba language model around the exponential-trapezoidal mixer with a rotating state.

The mixer and its equations are in layers/mixers/mamba3.py; the container is that of ssmzoo/models/mamba.py. There is
no short convolution, so nothing but the state is carried. The repository changed the activation of A over time; this
follows the module of state-spaces/mamba (the piecewise function), so checkpoints of other dates may differ.
Source: arXiv 2603.15569; state-spaces/mamba modules/mamba3.py (Apache-2.0).
"""

from __future__ import annotations

from ssmzoo.layers.mixers.mamba3 import Mamba3
from ssmzoo.models.mamba import MambaLM


class Mamba3LM(MambaLM):
    """ids (b l) -> ModelOutput(logits (b l v), state, {}). Arguments of MambaLM; `ssm_cfg` are the arguments of
    ssmzoo.layers.mixers.mamba3.Mamba3."""

    mixer = Mamba3
