"""Mamba whose tokens are made to diverge, converge or both along depth, by a parametrised x_proj.

The signs of the non-zero eigenvalues of S_C^T S_B (see ssmzoo/layers/scenario.py) are fixed for every layer; all else
is ssmzoo/models/mamba.py, whose `ssm_cfg={"scenario": ...}` says the same. The paper's WikiText-103 model: d_model 768,
24 layers, 25 epochs on 1024 tokens.
Source: Vo et al. 2025 (arXiv 2410.03292).
"""

from __future__ import annotations

from typing import Any

from ssmzoo.models.mamba import MambaLM


class ScenarioMambaLM(MambaLM):
    """ids (b l) -> ModelOutput(logits (b l v), state, {}).

    scenario   "divergent" (no token can collapse to the origin), "convergent" or "mixed"; the others as in `MambaLM`
    """

    def __init__(
        self,
        vocab_size: int = 50277,
        d_model: int = 768,
        n_layer: int = 24,
        scenario: str = "divergent",
        ssm_cfg: dict[str, Any] | None = None,
        tie_embeddings: bool = True,
    ):
        super().__init__(
            vocab_size,
            d_model,
            n_layer,
            ssm_cfg={**(ssm_cfg or {}), "scenario": scenario},
            tie_embeddings=tie_embeddings,
        )
        self.scenario = scenario
