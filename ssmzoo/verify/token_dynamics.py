"""Token dynamics: the parametrised x_proj with its spectrum, SoftSort, MambaVision's mixer."""

from __future__ import annotations

import torch
from torch import Tensor

from ssmzoo.layers.image.mamba_vision import MambaVisionMixer
from ssmzoo.models.token_dynamics import ReorderingMixer, Scenario, soft_sort

NAMES = {"pos": "divergent", "neg": "convergent", "real": "mixed"}


def golden(case) -> dict[str, Tensor]:
    """The parametrised x_proj with its spectrum, SoftSort, or MambaVision's mixer."""

    kwargs = case.official_kwargs
    if "scenario" in kwargs:
        r, n = kwargs["dt_rank"], kwargs["d_state"]
        weight = Scenario(NAMES[kwargs["scenario"]], r, n)(case.params["raw"])
        S_B, S_C = weight.detach()[r:].split(n)
        return {"x_proj_weight": weight, "eigenvalues": torch.linalg.eigvals(S_C.T @ S_B).real.sort().values}
    if "scores" in case.inputs:
        P = soft_sort(case.inputs["scores"], kwargs.get("tau", 1.0), kwargs.get("pow", 1.0), kwargs.get("hard", False))
        return {"P": P}
    kwargs = {
        k: v for k, v in kwargs.items() if k not in ("use_fast_path", "layer_idx", "conv_bias", "device", "dtype")
    }
    mixer = (ReorderingMixer if kwargs.pop("reorder", False) else MambaVisionMixer)(**kwargs)
    state = {k.replace("imporantness", "importance"): v for k, v in case.params.items()}
    return {"y": torch.func.functional_call(mixer, state, (case.inputs["x"],))}
