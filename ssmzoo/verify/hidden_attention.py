"""The attention that is hidden in Mamba: matrices and maps of the released block."""

from __future__ import annotations

import torch
from torch import Tensor

from ssmzoo.layers.mixers.mamba import Mamba
from ssmzoo.models.vim import VimMixer
from ssmzoo.probes import attribution_maps as maps
from ssmzoo.probes.attention_matrices import attention, attention_row, class_row, implicit_attention, scan_output
from ssmzoo.probes.tap import tap
from ssmzoo.released.vim import mixer_arguments


def golden(case) -> dict[str, Tensor]:
    """The released Mamba block with its matrices, or the maps made of given rows."""

    kwargs = case.official_kwargs
    if "xai_b" in case.inputs:
        rows, gradient, at = case.inputs["xai_b"], case.inputs["residual_grad"], kwargs["cls_position"]
        start, stop = kwargs.get("start_layer", 15), kwargs.get("num_layers", len(rows))
        rows, gradient = rows[:stop], gradient[:stop]
        return {
            "raw_attention": maps.raw(rows, at, start),
            "rollout": maps.rollout_cls_row(rows, at, start),
            "mamba_attribution": maps.attribution(rows, gradient, at, start),
        }
    if "if_devide_out" in kwargs:
        kwargs["if_divide_out"] = kwargs.pop("if_devide_out")
    both = kwargs.get("bimamba_type", "none") != "none"
    if both:
        mixer = VimMixer(**mixer_arguments(kwargs)[0])
    else:
        ours = {
            k: v
            for k, v in kwargs.items()
            if k not in ("use_fast_path", "layer_idx", "bimamba_type", "if_divide_out", "init_layer_scale")
        }
        mixer = Mamba(**ours)
    with tap(mixer, keep_graph=True) as scans:
        out = torch.func.functional_call(mixer, dict(case.params), (case.inputs["x"],))
    out, scan = (out if both else out[0]), scans[0]
    got = {"out": out}
    if not both:
        with torch.no_grad():  # as released: the matrices carry no gradient
            return got | {
                "attention": attention(scan),
                "y_ssm": scan_output(scan),
                "full_implicit_attention": implicit_attention(scan),
            }
    e, l = scan.total // 2, scan.u.shape[-1]
    matrices = attention(scan) if l <= 64 or "attn_matrix_a" in case.outputs else None
    if matrices is not None:
        got |= {"attn_matrix_a": matrices[:, :e], "attn_matrix_b": matrices[:, e:]}
    token = (l - 1) // 2
    exact = {
        f"exact_row{token}_{name}": attention_row(scan.take(half), row)
        for name, half, row in (("forward", range(e), token), ("backward", range(e, 2 * e), l - 1 - token))
    }
    exact[f"exact_row{token}_backward"] = exact[f"exact_row{token}_backward"].flip(-1)
    return got | exact | {"xai_vector": class_row(scan, token, missing_decay=True)}
