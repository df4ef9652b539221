"""Quamba and Quamba2 (enyac-group/Quamba): their rotations, quantisers, observers, clusters and GPTQ as golden cases.

Nothing of theirs is loaded here: the recipe is `ssmzoo.adapt.quantise`. Models of a few layers follow in
quamba_models.py. The released code computes 4-bit weights in fp16, so that is done here too where a case says so.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ssmzoo.adapt.quantise.clusters import Order, sort_and_cluster
from ssmzoo.adapt.quantise.gptq import Hessian, gptq
from ssmzoo.adapt.quantise.observers import LEAST_SCALE, RunningMax, RunningPercentile, quantile
from ssmzoo.adapt.quantise.quantisers import (
    embedding_rows,
    four_bit,
    four_bit_one_group,
    per_tensor,
    to_codes,
    two_levels,
)
from ssmzoo.layers.hadamard import hadamard, hadamard_matrix
from ssmzoo.released.quamba_models import golden_model

Outputs = dict[str, Tensor]


def golden(case) -> Outputs:
    """The case that its name says."""
    kinds = {
        "hadamard": rotations,
        "had_linear": rotated_linear,
        "int8_per_tensor": whole_tensors,
        "w4a16": four_bits,
        "w4a8": two_level_weights,
        "embedding": embedding,
        "percentile": percentiles,
        "minmax": extremes,
        "cluster_quant": clusters,
        "sort_indices": orders,
    }
    own = next((kind for name, kind in kinds.items() if case.name.startswith(name)), None)
    if own is None and case.name.startswith("gptq") and "_lm_" not in case.name:
        own = column_by_column
    return (own or golden_model)(case)


def rotations(case) -> Outputs:
    found = {f"y{name[1:]}": hadamard(x) for name, x in case.inputs.items()}
    return found | {f"H{n}": hadamard_matrix(n).to(torch.int8) for n in (12, 40)}


def rotated_linear(case) -> Outputs:
    weight = case.params["weight"].double()
    if case.official_kwargs.get("input_transform", True):
        weight = hadamard(weight)
    if case.official_kwargs.get("output_transform", True):
        weight = hadamard(weight.T).T
    return {"weight_fused": weight.float(), "y": case.inputs["x"] @ weight.float().T}


def whole_tensors(case) -> Outputs:
    found = {}
    for name, w in case.inputs.items():
        for title, bits, clip in (("8", 8, 1.0), ("4", 4, 1.0), ("8_clip0.9", 8, 0.9)):
            found[f"q{title}/{name}"], found[f"scale{title}/{name}"] = per_tensor(w, bits, clip)
    return found


def four_bits(case) -> Outputs:
    def rule(w: Tensor):
        return four_bit_one_group(w) if case.official_kwargs["group_size"] == -1 else four_bit(w)

    found = {}
    for title, w in (("", case.inputs["weight"]), ("_float32", case.inputs["weight"].float())):
        codes = rule(w)
        found |= {f"q{title}": codes.q, f"scale{title}": codes.scale, f"dequantised{title}": codes.values().to(w.dtype)}
    if "weight_zero_group" in case.inputs:
        codes = rule(case.inputs["weight_zero_group"])
        found |= {"scale_zero_group": codes.scale, "dequantised_zero_group": codes.values().half()}
    return found


def two_level_weights(case) -> Outputs:
    size = None if case.official_kwargs["group_size"] == -1 else case.official_kwargs["group_size"]
    found = {}
    for title, w in (("", case.inputs["weight"]), ("_float32", case.inputs["weight"].float())):
        two = two_levels(w, size)
        values = (
            two.q.to(w.dtype) * (two.s_channel * 16).to(w.dtype)
            if size is None
            else two.int8 * two.s_channel.to(w.dtype)
        )
        found |= {f"q{title}": two.q, f"s_channel{title}": two.s_channel, f"q_int8{title}": two.int8}
        found |= {f"dequantised{title}": values} | ({} if size is None else {f"s_group{title}": two.s_group})
    found["gptq_s_channel"] = found["s_channel"]  # with GPTQ, of the row that it gave: here the same one
    return found


def embedding(case) -> Outputs:
    bits, w = case.official_kwargs["num_bits"], case.inputs["weight"]
    codes = embedding_rows(w, bits, signed_maximum=True)
    values = codes.q.half() * codes.scale.half()
    found = {"q": codes.q, "scale": codes.scale[:, 0], "dequantised": values, "rows": values[case.inputs["ids"]]}
    return found | {"q_float32": embedding_rows(w.float(), bits, signed_maximum=True).q}


def percentiles(case) -> Outputs:
    alpha, sigma = case.official_kwargs["percentile_alpha"], case.official_kwargs["percentile_sigma"]
    observer = RunningPercentile(None, alpha, sigma)
    quantiles, running, high, low = [], [], [], []
    for name in sorted(case.inputs):
        x = case.inputs[name]
        observer.update(x)
        quantiles.append(quantile(x.abs().flatten(), alpha))
        running.append(observer.value[0])
        for values, q in ((high, quantile(x.flatten(), alpha)), (low, quantile(x.flatten(), 1 - alpha))):
            values.append(q if not values else values[-1] + sigma * (q - values[-1]))
    scale = (high[-1] - low[-1]) / 255
    found = {"quantiles": quantiles, "running_max": running, "asym_running_max": high, "asym_running_min": low}
    return {name: torch.stack(values) for name, values in found.items()} | {
        "scale": observer.scale()[0],
        "asym_scale": scale,
        "asym_zero": torch.round(-low[-1] / scale).clamp(0, 255),
    }


def extremes(case) -> Outputs:
    xs = [case.inputs[name] for name in sorted(case.inputs) if name != "zeros"]
    observer, zeros = RunningMax(), RunningMax()
    groups = RunningMax(torch.arange(2).repeat_interleave(case.official_kwargs["dstate"]))
    for x in xs:
        observer.update(x)
        groups.update(x)
    zeros.update(case.inputs["zeros"])
    found, clip = {}, case.official_kwargs["clip_ratio"]
    high, low = max(x.max() for x in xs), min(x.min() for x in xs)
    for title, factor in (("", 1.0), ("_clip", clip)):
        found[f"scale/sym8{title}"], found[f"zero/sym8{title}"] = observer.scale()[0] * factor, torch.zeros(())
        scale = (high - low) * factor / 255
        found[f"scale/asym8{title}"], found[f"zero/asym8{title}"] = scale, torch.round(-low * factor / scale)
    found |= {"scale/sym4": (observer.value[0] / 7).clamp_min(LEAST_SCALE), "zero/sym4": torch.zeros(())}
    return found | {"scale/zeros": zeros.scale()[0], "scale/per_ssd_group": groups.scale()}


def clusters(case) -> Outputs:
    """x (b l h p) and states (b h p n), whose channels share scales by cluster, states one per state index."""
    sizes = case.inputs["head_group_sizes"], case.inputs["channel_group_sizes"]
    parts, shape = Order(torch.empty(0), torch.empty(0), *sizes).parts(), tuple(sizes[1].shape)

    def observed(*tensors: Tensor) -> Tensor:
        """(clusters)"""
        observer = RunningMax(parts)
        for t in tensors:
            observer.update(t)
        return observer.scale()

    x, x2 = (case.inputs[name].flatten(-2) for name in ("x", "x2"))
    states = [case.inputs[name].flatten(1, 2) for name in ("state", "state2")]  # (b hp n)
    x_scale, n = observed(x), states[0].shape[-1]
    state_scale = torch.stack([observed(states[0][..., i]) for i in range(n)], dim=-1)  # (clusters n)
    both = torch.stack([observed(*(s[..., i] for s in states)) for i in range(n)], dim=-1)
    q = [torch.round(t / x_scale[parts]).clamp(-128, 127) for t in (x, x2)]
    s = [torch.round(t.double() / state_scale[parts]).clamp(-128, 127) for t in states]
    like, state_like = case.inputs["x"].shape, case.inputs["state"].shape
    values = (q[0] * x_scale[parts]).view(like)
    return {
        "x_q": q[0].view(like).to(torch.int8),
        "x2_q_with_x_scales": q[1].view(like).to(torch.int8),
        "x_scales": x_scale.view(shape),
        "x_fake": values,
        "x_dequantised": values,
        "observed_x_scales": observed(x, x2).view(shape),
        "state_q": s[0].view(state_like).to(torch.int8),
        "state2_q_with_state_scales": s[1].view(state_like).to(torch.int8),
        "state_scales": state_scale.view(*shape, n),
        "state_dequantised": (s[0].float() * state_scale[parts]).view(state_like),
        "observed_state_scales": both.view(*shape, n),
    }


def orders(case) -> Outputs:
    k = case.official_kwargs
    sizes = k["headdim"], k["ssd_ngroups"], k["nhead_groups"], k["ndim_groups"]
    order = sort_and_cluster(case.inputs["channel_stat"], *sizes, as_released=True)
    return dict(zip(("channel_index", "head_index", "head_group_sizes", "channel_group_sizes"), order))


def column_by_column(case) -> Outputs:
    k, w = case.official_kwargs, case.params["weight"]
    hessian = Hessian(k["in_features"])
    for name in sorted(case.inputs):
        hessian.update(case.inputs[name])
    codes = gptq(w, hessian.value, k["w_bits"], k["group_size"], k["percdamp"], half=True)
    return {
        "hessian": hessian.value,
        "codes": codes.q,
        "group_scale": codes.scale.T,
        "weight_quantised": codes.values().half().float(),
        "weight_round_to_nearest": nearest(w, k["w_bits"], k["group_size"]).half().float(),
    }


def nearest(w: Tensor, bits: int, group_size: int) -> Tensor:
    from ssmzoo.adapt.quantise.quantisers import group_scales

    scale = group_scales(w, bits, group_size).repeat_interleave(group_size, 1)[:, : w.shape[1]]
    return to_codes(w, scale, bits) * scale
