"""Golden cases of Quamba that are models of one or two layers: fused, rotated, reordered, calibrated, quantised."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ssmzoo.adapt.quantise.clusters import Order, sort_and_cluster
from ssmzoo.adapt.quantise.gptq import gptq
from ssmzoo.adapt.quantise.norms import fuse_norms, untie
from ssmzoo.adapt.quantise.observers import RunningMax, RunningPercentile
from ssmzoo.adapt.quantise.pipeline import hessians_of
from ssmzoo.adapt.quantise.plan import Settings
from ssmzoo.adapt.quantise.points import Points, calibrate, mamba2_points, points_of
from ssmzoo.adapt.quantise.quantisers import eight_bit, per_tensor
from ssmzoo.adapt.quantise.reorder import channel_statistics, mixers, permute
from ssmzoo.adapt.quantise.replace import put, quantised_conv, quantised_linear_layer
from ssmzoo.adapt.quantise.rotation import rotate
from ssmzoo.adapt.quantise.tap import Taps
from ssmzoo.layers.hadamard import hadamard
from ssmzoo.layers.mixers.mamba import Mamba
from ssmzoo.models.mamba import MambaLM
from ssmzoo.models.mamba2 import Mamba2LM
from ssmzoo.ops.quantized_linear import quantize_activation

Outputs = dict[str, Tensor]


def build(case) -> nn.Module:
    k = case.official_kwargs
    mixer = {"d_state": k["d_state"], "expand": k["expand"], "d_conv": k["d_conv"]}
    if k["layer"] == "Mamba2":
        mixer |= {"headdim": k["headdim"], "ngroups": k["ngroups"]}
    model = (Mamba2LM if k["layer"] == "Mamba2" else MambaLM)(
        k["vocab_size"], k["d_model"], k["n_layer"], ssm_cfg=mixer, norm_eps=k["eps"], pad_vocab_size_multiple=1
    )
    model.load_state_dict({name: value.detach() for name, value in case.params.items()})
    return model.double().eval().requires_grad_(False)


@torch.no_grad()
def golden_model(case) -> Outputs:
    model = build(case)
    name = case.name.partition("_lm_")[0] if "_lm_" in case.name else case.name.partition("_")[0]
    kinds = {"rotation": rotated, "rotation_mamba1": rotated, "reorder": reordered, "calibration": calibrated}
    return (kinds | {"gptq": by_gptq, "w8a8": by_integers})[name](case, model)


def rotated(case, model: nn.Module) -> Outputs:
    found = {"logits": model(case.inputs["input_ids"]).logits}
    fuse_norms(untie(model))
    found |= {f"norm_fused/{k}": v.clone() for k, v in model.state_dict().items()}
    rotate(model)
    error = (model(case.inputs["input_ids"]).logits - found["logits"]).norm() / found["logits"].norm()
    if not error < 1e-10:
        raise ValueError(f"rotating changed the logits by {error:.1e}")
    return found | {f"rotated/{k}": v for k, v in model.state_dict().items()}


def order_of(case, model: nn.Module) -> tuple[dict[str, Order], Outputs]:
    """Orders of all mixers as the released code clusters them, the mixers permuted; what the cases store of that."""
    rows, found, orders = list(case.inputs["calibration_ids"]), {}, {}
    statistics = channel_statistics(model, rows, list(mixers(model)))
    for i, (name, mixer) in enumerate(mixers(model).items()):
        order = sort_and_cluster(statistics[name], mixer.headdim, mixer.ngroups, as_released=True)
        permute(mixer, order.channels, order.heads)
        names = ("channel_index", "head_index", "head_group_sizes", "channel_group_sizes")
        found |= {f"{n}/{i}": t for n, t in zip(names, order)} | {f"channel_stat/{i}": statistics[name]}
        orders[name] = order
    return orders, found


def reordered(case, model: nn.Module) -> Outputs:
    _, found = order_of(case, model)
    found |= {f"reordered/{k}": v for k, v in model.state_dict().items()}
    return found | {"logits": model(case.inputs["input_ids"]).logits}


def observed(model: nn.Module, case, orders: dict[str, Order]) -> tuple[Points, Outputs]:
    """The points of a model, and every static scale under the names of the cases."""
    kwargs, rows = case.official_kwargs, list(case.inputs["calibration_ids"])
    settings = Settings(mode="w8a8", percentile=kwargs.get("percentile_alpha", 0.9995))
    points = points_of(model, settings, orders)
    more, states = Points(), {}
    names = [name for name, m in model.named_modules() if hasattr(m, "state_bytes")]
    for name in names:
        mixer = model.get_submodule(name)
        if isinstance(mixer, Mamba):
            for part in ("in_proj", "x_proj", "dt_proj", "out_proj"):
                more.outputs[f"{name}.{part}"] = [(RunningMax(), getattr(mixer, part).out_features)]
        else:
            mamba2_points(more, name, mixer, None, settings)
            gn = mixer.ngroups * mixer.d_state
            more.outputs[f"{name}.conv1d"] = [(RunningMax(), w) for w in (mixer.d_ssm, gn, gn)]
            more.outputs[f"{name}.out_proj"] = [(RunningMax(), mixer.out_proj.out_features)]
        more.inputs[f"{name}.out_proj"] = RunningMax()
        order = orders.get(name)
        parts = None if order is None else order.parts()
        n = mixer.d_state if order is not None else 1
        alone = [RunningMax(parts) if order is not None else RunningPercentile() for _ in range(n)]
        states[name] = (alone, RunningMax(), RunningMax())
    more.outputs["lm_head"] = [(RunningMax(), kwargs["vocab_size"])]
    calibrate(model, points, rows)
    calibrate(model, more, rows)
    watch_states(model, states, rows)
    return points, scales(model, points, more, states, orders)


def watch_states(model: nn.Module, states: dict, rows: list[Tensor]) -> None:
    """The final state of every sample, and what the scan gives (the input of the gated norm)."""
    with Taps() as taps:
        for name, (_, _, scan) in states.items():
            norm = getattr(model.get_submodule(name), "norm", None)
            if norm is not None:
                taps.inputs(norm, scan.update)
        for row in rows:
            for (alone, whole, _), state in zip(states.values(), model(row[None]).state):
                ssm = state.ssm.float()
                whole.update(ssm)
                flat = ssm.flatten(1, -2)  # (b hp n)
                for i, observer in enumerate(alone):
                    observer.update(flat[..., i] if len(alone) > 1 else flat)


def scales(model, points: Points, more: Points, states: dict, orders: dict[str, Order]) -> Outputs:
    found = {"scale/head/lm_head:input": points.input_scale("lm_head")}
    found["scale/head/lm_head:output"] = more.outputs["lm_head"][0][0].scale()[0]
    for i, (name, (alone, whole, scan)) in enumerate(states.items()):
        at = f"scale/{i}"
        found[f"{at}/ssm_state_act:output"] = whole.scale()[0]
        state = torch.stack([observer.scale() for observer in alone], dim=-1)
        order = orders.get(name)
        found[f"{at}/ssm_state_act:input"] = (
            state[0, 0] if order is None else state.view(*order.channel_sizes.shape, -1)
        )
        found[f"{at}/in_proj:input"] = points.input_scale(f"{name}.in_proj")
        found[f"{at}/out_proj:input"] = more.input_scale(f"{name}.out_proj")
        if isinstance(model.get_submodule(name), Mamba):
            for part in ("in_proj", "x_proj", "dt_proj", "out_proj"):
                found[f"{at}/{part}:output"] = more.outputs[f"{name}.{part}"][0][0].scale()[0]
            found[f"{at}/x_proj:input"] = points.input_scale(f"{name}.x_proj")
            found[f"{at}/dt_proj:input"] = points.input_scale(f"{name}.dt_proj")
            continue
        for part in ("in_proj", "out_proj"):
            found[f"{at}/{part}:output"] = whole_output(more, f"{name}.{part}")
        scales_in, scales_out = points.outputs[f"{name}.in_proj"], points.outputs[f"{name}.conv1d"]
        ends = more.outputs[f"{name}.conv1d"]
        parts = dict(zip(("z_act", "x_conv_in", "B_conv_in", "C_conv_in", "dt_act"), scales_in))
        for part, (observer, _) in parts.items():
            found[f"{at}/{part}:input"] = found[f"{at}/{part}:output"] = observer.scale()[0]
        for part, (observer, _), (one, _) in zip("xBC", scales_out, ends):
            scale = observer.scale()
            if part == "x":
                scale = scale[0] if order is None else scale.view(order.channel_sizes.shape)
            elif order is None:
                scale = one.scale()[0]
            found[f"{at}/{part}_conv_out:input"], found[f"{at}/{part}_conv_out:output"] = scale, one.scale()[0]
        found[f"{at}/ssd_out_act:input"] = found[f"{at}/ssd_out_act:output"] = scan.scale()[0]
    return found


def whole_output(more: Points, name: str) -> Tensor:
    """The scale of all of a layer's output."""
    return torch.stack([observer.scale().max() for observer, _ in more.outputs[name]]).max()


def calibrated(case, model: nn.Module) -> Outputs:
    rotate(fuse_norms(untie(model)))
    return observed(model, case, {})[1]


def by_gptq(case, model: nn.Module) -> Outputs:
    """Layer by layer, the layers before as fp16 values of their integers; the head last."""
    k, ids = case.official_kwargs, case.inputs["input_ids"]
    found = {"logits_float": model(ids).logits}
    rotate(fuse_norms(untie(model)))
    settings = Settings(group_size=k["group_size"], damping=k["percdamp"], half=True)
    streams = [model.backbone.embedding(row[None]) for row in case.inputs["calibration_ids"]]
    for i, block in enumerate(model.backbone.layers):
        for name, hessian in hessians_of(block, "", settings, streams).items():
            layer = block.get_submodule(name.removeprefix("."))
            found |= replaced(layer, hessian, settings, f"{i}/{name.rpartition('.')[2]}")
        streams = [block(x)[0] for x in streams]
    streams = [model.backbone.norm_f(x) for x in streams]
    (hessian,) = hessians_of(model.lm_head, "lm_head", settings, streams).values()
    found |= replaced(model.lm_head, hessian, settings, "lm_head")
    # the head's run in fp16, of which the case keeps the integers too, is not repeated
    found |= {f"{n}_fp16/lm_head": case.outputs[f"{n}_fp16/lm_head"] for n in ("codes", "group_scale")}
    return found | {"logits_quantised": model(ids).logits}


def replaced(layer: nn.Linear, hessian: Tensor, settings: Settings, title: str) -> Outputs:
    """Give a layer the fp16 values of its integers."""
    codes = gptq(layer.weight, hessian, 4, settings.group_size, settings.damping, settings.half)
    layer.weight.copy_(codes.values().half())
    return {f"codes/{title}": codes.q, f"group_scale/{title}": codes.scale.T}


def part_numbers(points: Points, name: str) -> Tensor:
    """(rows) the number of the part of in_proj's output that a row belongs to."""
    widths = [width for _, width in points.outputs[name]]
    return torch.arange(len(widths)).repeat_interleave(torch.tensor(widths))


def by_integers(case, model: nn.Module) -> Outputs:
    ids = case.inputs["input_ids"]
    logits = model(ids).logits
    orders, found = order_of(case, model) if case.official_kwargs["grouped"] else ({}, {})
    rotate(fuse_norms(untie(model)))
    points, named = observed(model, case, orders)
    found |= named | {"logits_float": logits}
    model = model.float()
    if not orders:  # B and C have one scale each then
        for name, parts in points.outputs.items():
            if name.endswith("conv1d"):
                points.outputs[name] = [parts[0], *((one_part(o), w) for o, w in parts[1:])]
    made: dict[str, nn.Module] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            parts = part_numbers(points, name) if name in points.outputs else torch.zeros(layer.out_features).long()
            codes = eight_bit(layer.weight, parts)
            made[name] = quantised_linear_layer(name, layer, codes, 8, points)
        elif isinstance(layer, nn.Conv1d):
            made[name] = quantised_conv(name, layer, points)
    put(model, made)
    for i, mixer in enumerate(mixers(model).values()):
        for name in ("A_log", "D"):
            q, scale = per_tensor(getattr(mixer, name))
            getattr(mixer, name).copy_(q * scale)
            found |= {f"int8_weight{i}/{name}": q, f"weight_scale{i}/{name}": scale}
        mixer.dt_bias.copy_(mixer.dt_bias.half())  # the released layers keep it in fp16
    return found | weights(made) | stages(model, ids, found, case.outputs)


def one_part(observer: RunningMax) -> RunningMax:
    made = RunningMax()
    made.value = observer.value.max()[None]
    return made


def weights(made: dict[str, nn.Module]) -> Outputs:
    """The integers of layer 0 and the head."""
    mixer = "backbone.layers.0.mixer"
    conv, into, out = (made[f"{mixer}.{n}"] for n in ("conv1d", "in_proj", "out_proj"))
    firsts = torch.tensor([0, out.in_features, conv.channels - (conv.channels - out.in_features) // 2])
    return {
        "int8_weight0/in_proj": into.weight,
        "int8_weight0/out_proj": out.weight,
        "int8_weight0/conv1d": conv.weight[:, 0],
        "int8_weight0/conv1d_bias": conv.bias,
        "int8_weight/lm_head": made["lm_head"].weight,
        "weight_scale0/in_proj_over_out_scale": into.scale[:, 0] / into.output.scale,
        "weight_scale0/out_proj": out.scale[:1, 0],
        "weight_scale0/conv1d": conv.scale[firsts],
        "weight_scale0/conv1d_bias": conv.bias_scale[firsts],
    }


def stages(model: nn.Module, ids: Tensor, known: Outputs, before: Outputs) -> Outputs:
    """Every integer of layer 0 on its way, from one pass of the model of integers."""
    mixer, head = mixers(model)["backbone.layers.0.mixer"], model.lm_head
    seen: Outputs = {}
    handles = [
        mixer.in_proj.register_forward_pre_hook(lambda m, a: seen.update(u=a[0])),
        mixer.in_proj.register_forward_hook(lambda m, a, y: seen.update(projected=y)),
        mixer.norm.register_forward_pre_hook(lambda m, a: seen.update(y_scan=a[0])),
        mixer.norm.register_forward_hook(lambda m, a, y: seen.update(y_normed=y)),
        mixer.conv1d.output.register_forward_hook(lambda m, a, y: seen.update(convolved=y.mT)),
        mixer.out_proj.register_forward_hook(lambda m, a, y: seen.update(out=y)),
        head.register_forward_pre_hook(lambda m, a: seen.update(head=a[0])),
    ]
    logits, state, _ = model(ids)
    for handle in handles:
        handle.remove()
    for t in range(ids.shape[1]):  # the recurrence token by token, as the case was computed
        state = model(ids[:, t : t + 1], state if t else None).state
    p, gn, h = mixer.d_ssm, mixer.ngroups * mixer.d_state, mixer.nheads
    into, conv = mixer.in_proj, mixer.conv1d
    projected = torch.round(seen["projected"] / into.output.scale).split([p, p, gn, gn, h], dim=-1)
    convolved = torch.round(seen["convolved"] / conv.output.scale).split([p, gn, gn], dim=-1)
    raw = torch.round(state[0].conv / into.output.scale[p:-h, None])
    scale = known["scale/0/ssm_state_act:input"]
    if scale.ndim:  # by cluster of channels
        order = Order(
            *(known[f"{n}/0"] for n in ("channel_index", "head_index", "head_group_sizes", "channel_group_sizes"))
        )
        scale = scale.flatten(0, 2)[order.parts()].view(h, mixer.headdim, -1)
    names = ("q_z", "q_x_conv_in", "q_B_conv_in", "q_C_conv_in", "q_dt", "q_x", "q_B", "q_C")
    found = {f"stage0/{n}": t.to(torch.int8) for n, t in zip(names, (*projected, *convolved))}
    q_u = quantize_activation(seen["u"], into.act_scale)[0]
    q_y = quantize_activation(hadamard(before["stage0/y_normed"]), mixer.out_proj.act_scale)[0]
    q_state = torch.round(state[0].ssm / scale).clamp(-128, 127)
    found |= {f"stage0/{n}": seen[n] for n in ("y_scan", "y_normed", "out")}
    integers = {"q_u": q_u, "q_y": q_y, "q_state": q_state, "q_conv_state": raw}
    found |= {f"stage0/{n}": t.to(torch.int8) for n, t in integers.items()}
    q_head = quantize_activation(seen["head"], head.act_scale)[0].to(torch.int8)
    return found | {"q_head_in": q_head, "logits_w8a8": logits}
