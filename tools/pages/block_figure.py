"""A block of a model as SVG: its modules in the order in which a forward pass calls them, parameters, shapes."""

from __future__ import annotations

import html
from typing import NamedTuple

import torch
from torch import Tensor, nn

WIDTH, ROW, GAP, PAD = 640, 30, 8, 12


class Box(NamedTuple):
    name: str
    kind: str
    parameters: int
    shape: str
    inside: list  # of Box


def order_of_calls(model: nn.Module, inputs: tuple) -> dict[nn.Module, tuple[int, str]]:
    """{module: (when it was first called, shape of its result)} of one forward pass."""
    found: dict[nn.Module, tuple[int, str]] = {}
    count = iter(range(10**6))

    def before(module, _):
        found.setdefault(module, (next(count), ""))

    def after(module, _, out):
        out = out[0] if isinstance(out, tuple) and out and isinstance(out[0], Tensor) else out
        if isinstance(out, Tensor):
            found[module] = (found[module][0], " × ".join(map(str, out.shape[1:])))

    handles = [
        h for m in model.modules() for h in (m.register_forward_pre_hook(before), m.register_forward_hook(after))
    ]
    try:
        with torch.no_grad():
            model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found


def repeated_block(model: nn.Module) -> tuple[str, nn.Module, int]:
    """(name, module, how often) of the block that most parameters stand in; the model itself when nothing repeats."""
    kinds: dict[str, list[tuple[str, nn.Module]]] = {}
    for name, module in model.named_modules():
        own = type(module).__module__.startswith("ssmzoo.")
        if name and own and any(word in type(module).__name__ for word in ("Block", "Layer")):
            if sum(1 for _ in module.children()) > 1:
                kinds.setdefault(type(module).__name__, []).append((name, module))
    size = {k: sum(p.numel() for _, m in members for p in m.parameters()) for k, members in kinds.items()}
    inner = [k for k in kinds if not any(type(c).__name__ in size for c in list(kinds[k][0][1].modules())[1:])]
    if not inner:
        return "", model, 1
    kind = max(inner, key=size.get)
    return *kinds[kind][-1], len(kinds[kind])


def boxes(module: nn.Module, calls: dict, depth: int) -> list[Box]:
    found = []
    for name, child in sorted(module.named_children(), key=lambda c: calls.get(c[1], (10**6, ""))[0]):
        size = sum(p.numel() for p in child.parameters())
        if isinstance(child, nn.Identity) or (isinstance(child, (nn.ModuleList, nn.Sequential)) and not len(child)):
            continue
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):  # no step of its own: its members stand here
            found += [b._replace(name=f"{name}.{b.name}") for b in boxes(child, calls, depth)]
            continue
        deeper = depth > 0 and not type(child).__module__.startswith("torch.")
        inside = boxes(child, calls, depth - 1) if deeper else []
        found.append(
            Box(name, type(child).__name__, size, calls.get(child, (0, ""))[1], inside if len(inside) < 14 else [])
        )
    return found


def height(box: Box) -> int:
    return ROW + (sum(height(b) + GAP for b in box.inside) + PAD - GAP if box.inside else 0)


def draw(box: Box, x: int, y: int, width: int) -> list[str]:
    own = sum(b.parameters for b in box.inside)
    size = f"{box.parameters:,}" if box.parameters and (not box.inside or own <= box.parameters) else ""
    name, kind = html.escape(box.name), html.escape("" if box.kind == "_" else box.kind)
    style = "group" if box.inside else "leaf"
    lines = [
        f'<rect x="{x}" y="{y}" width="{width}" height="{height(box)}" rx="6" class="{style}"/>',
        f'<text x="{x + 10}" y="{y + 20}"><tspan class="name">{name}</tspan> <tspan class="kind">{kind}</tspan></text>',
        f'<text x="{x + width - 130}" y="{y + 20}" class="size" text-anchor="end">{size}</text>',
        f'<text x="{x + width - 10}" y="{y + 20}" class="shape" text-anchor="end">{box.shape}</text>',
    ]
    below = y + ROW
    for child in box.inside:
        lines += draw(child, x + PAD, below, width - 2 * PAD)
        below += height(child) + GAP
    return lines


def figure(model: nn.Module, inputs: tuple | None) -> tuple[str, str]:
    """(svg, caption); without inputs, or where the forward cannot run, the order is that of the constructor."""
    calls: dict = {}
    if inputs is not None:
        try:
            calls = order_of_calls(model.eval(), inputs)
        except Exception:
            calls = {}
    name, block, times = repeated_block(model)
    top = Box(name or "the model", type(block).__name__, sum(p.numel() for p in block.parameters()), "", [])
    top = top._replace(inside=boxes(block, calls, 1), shape=calls.get(block, (0, ""))[1])
    total = height(top) + 4
    svg = "\n".join(
        [
            f'<svg class="block-figure" viewBox="0 0 {WIDTH} {total}" role="img" aria-label="modules of {top.kind}">',
            *draw(top, 2, 2, WIDTH - 4),
            "</svg>",
        ]
    )
    how = "in the order in which a forward pass calls them" if calls else "in the order of the constructor"
    often = f", one of {times}" if times > 1 else ""
    return svg, f"`{top.kind}`{often} in the laptop size, its modules {how}: parameters, shape of the result"
