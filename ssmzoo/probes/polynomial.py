"""Layers as polynomials of their tokens: degree, degree per token, coupled tokens, monomials.

    linear attention   y_i = sum_{j<=i} (q_i^T k_j) v_j                                   degree 3 at any length
    simplified S6      y_i = C_i sum_{j<=i} (prod_{k=j+1..i} Abar_k) Bbar_j x_j           degree 4 + a (i - 1)
                       Abar = sum_{p<=a} (Delta A)^p / p!,  Bbar = Delta B x,  C = W_C x,  Delta = w^T x

so that one S6 layer reaches any degree with length, where linear attention needs log_3 of it in layers. Real layers
(exp, softplus, SiLU) are no polynomials: for them `chebyshev` shows how fast the coefficients fall.
The layers take floats, float64 arrays or sympy symbols alike.

l length, d width, n state size, a order of the expanded exponential.
Source: Cohen-Karlik et al. 2025 (arXiv 2502.02209) for the layers; the degrees are derived from their definitions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import combinations
from typing import NamedTuple

import numpy as np

Layer = Callable[[np.ndarray], np.ndarray]  # tokens (l d) -> (l d)


def linear_attention(W_q: np.ndarray, W_k: np.ndarray, W_v: np.ndarray) -> Layer:
    """W_q, W_k (m d), W_v (d d)"""

    def layer(x: np.ndarray) -> np.ndarray:
        q, k, v = x @ W_q.T, x @ W_k.T, x @ W_v.T
        return np.stack([sum((q[i] @ k[j]) * v[j] for j in range(i + 1)) for i in range(len(x))])

    return layer


def simplified_s6(
    A: np.ndarray,
    W_B: np.ndarray,
    W_C: np.ndarray,
    w: np.ndarray,
    order: int = 1,
    write_step: bool = True,
    constant: bool = False,
) -> Layer:
    """A (d n), W_B, W_C (n d), w (d).

    order       a of the expansion of exp(Delta A); 0: Abar = 1
    write_step  Bbar = Delta B x, or B x alone
    constant    Delta, B and C of the all-ones token in place of x: a time-invariant, linear layer
    """

    def layer(x: np.ndarray) -> np.ndarray:
        h, out = np.zeros(A.shape, dtype=x.dtype), []
        for token in x:
            source = np.ones_like(token) if constant else token
            step = w @ source
            decay = sum((step * A) ** p / math.factorial(p) for p in range(1, order + 1)) + 1
            write = (W_B @ source) * (step if write_step else 1)
            h = decay * h + token[:, None] * write[None]
            out.append(h @ (W_C @ source))
        return np.stack(out)

    return layer


def stacked(layers: list[Layer]) -> Layer:
    def layer(x: np.ndarray) -> np.ndarray:
        for f in layers:
            x = f(x)
        return x

    return layer


def random_layer(kind: str, d: int = 1, n: int = 1, seed: int = 0, **options) -> Layer:
    """ "s6" or "linear_attention" with normal weights (A uniform in -1.5 .. -0.5): generic, never zeros or ones."""
    draw = np.random.default_rng(seed)
    if kind == "linear_attention":
        return linear_attention(*(draw.normal(size=s) for s in ((n, d), (n, d), (d, d))))
    if kind != "s6":
        raise ValueError(f"kind is {kind!r}; expected 's6' or 'linear_attention'")
    return simplified_s6(
        draw.uniform(-1.5, -0.5, (d, n)),
        draw.normal(size=(n, d)),
        draw.normal(size=(n, d)),
        draw.normal(size=d),
        **options,
    )


# ---- degrees by evaluation ------------------------------------------------------------------------------------------


def chebyshev(function: Callable[[float], float], nodes: int = 48) -> np.ndarray:
    """|Chebyshev coefficients| of s -> function(s) on [-1, 1], relative to the largest."""
    s = np.cos(np.pi * (np.arange(nodes) + 0.5) / nodes)
    values = np.array([function(t) for t in s])
    modes = np.cos(np.pi * np.outer(np.arange(nodes), np.arange(nodes) + 0.5) / nodes)
    coefficients = np.abs(modes @ values) * 2 / nodes
    return coefficients / max(coefficients.max(), 1e-300)


def degree(function: Callable[[float], float], nodes: int = 48, tolerance: float = 1e-12) -> int:
    """Degree of a polynomial of one variable, below `nodes`."""
    found = np.flatnonzero(chebyshev(function, nodes) > tolerance)
    if len(found) and found[-1] >= nodes - 2:  # even functions leave out every second
        raise ValueError(
            f"the function is no polynomial of degree below nodes = {nodes}; give more nodes, or plot its "
            f"coefficients with `chebyshev`"
        )
    return int(found[-1]) if len(found) else 0


def total_degree(layer: Layer, x: np.ndarray, nodes: int = 48, tolerance: float = 1e-12) -> int:
    """Along the ray s x, of the last position's first channel; x (l d) about 1 in size."""
    return degree(lambda s: layer(s * x)[-1, 0], nodes, tolerance)


def token_degrees(layer: Layer, x: np.ndarray, nodes: int = 48, tolerance: float = 1e-12) -> list[int]:
    """The same with only one token scaled, for every token."""

    def scaled(k: int) -> Callable[[float], float]:
        def function(s: float) -> float:
            moved = x.copy()
            moved[k] = s * x[k]
            return layer(moved)[-1, 0]

        return function

    return [degree(scaled(k), nodes, tolerance) for k in range(len(x))]


def interaction_order(layer: Layer, x: np.ndarray, tolerance: float = 1e-9) -> int:
    """Largest r for which some r tokens interact: the mixed difference over them (each present or zero) is not 0.

    2^l evaluations of the layer: for l up to about 10.
    """
    l = len(x)
    if l > 12:
        raise ValueError(f"{l} tokens need 2^{l} evaluations; take at most 12")
    present = np.array([[bits >> k & 1 for k in range(l)] for bits in range(2**l)], dtype=bool)
    value = np.array([layer(np.where(row[:, None], x, 0.0))[-1, 0] for row in present])
    scale = np.abs(value).max()
    for r in range(l, 0, -1):
        for tokens in combinations(range(l), r):
            mask = sum(1 << k for k in tokens)
            subsets = [s for s in range(2**l) if s & ~mask == 0]
            difference = sum((-1) ** (r - int(present[s].sum())) * value[s] for s in subsets)
            if abs(difference) > tolerance * scale:
                return r
    return 0


# ---- monomials by algebra -------------------------------------------------------------------------------------------


class Census(NamedTuple):
    """Of the last position: total degree, degree in every token, tokens in the fullest monomial, number of monomials,
    and |coefficient| by total degree (largest)."""

    degree: int
    token_degrees: list[int]
    tokens_per_monomial: int
    monomials: int
    coefficients: dict[int, float]


def census(make: Callable[..., Layer], length: int, d: int = 1) -> Census:
    """Expand a layer symbolically: `make` is a Layer built from exact numbers (Python ints, Fractions, sympy Rationals
    as object arrays), applied to symbols. Tiny sizes only: length <= 6."""
    import sympy

    symbols = sympy.symbols(f"x0:{length * d}")
    x = np.array(symbols, dtype=object).reshape(length, d)
    polynomial = sympy.Poly(sympy.expand(make(x)[-1, 0]), *symbols)
    by_token = [[sum(powers[i * d : (i + 1) * d]) for i in range(length)] for powers in polynomial.monoms()]
    coefficients: dict[int, float] = {}
    for powers, value in zip(by_token, polynomial.coeffs()):
        coefficients[sum(powers)] = max(coefficients.get(sum(powers), 0.0), abs(float(value)))
    return Census(
        polynomial.total_degree(),
        [max(column) for column in zip(*by_token)],
        max(sum(p > 0 for p in powers) for powers in by_token),
        len(by_token),
        coefficients,
    )


def rational_layer(kind: str, d: int = 1, n: int = 1, seed: int = 0, **options) -> Layer:
    """`random_layer` with weights that are generic rational numbers, for `census`."""
    import sympy

    draw = np.random.default_rng(seed)

    def numbers(*shape: int) -> np.ndarray:
        top, bottom = draw.integers(1, 1000, shape), draw.integers(1, 1000, shape)
        sign = draw.choice([-1, 1], shape)
        flat = [sympy.Rational(int(s * t), int(b)) for s, t, b in zip(sign.flat, top.flat, bottom.flat)]
        return np.array(flat, dtype=object).reshape(shape)

    if kind == "linear_attention":
        return linear_attention(numbers(n, d), numbers(n, d), numbers(d, d))
    if kind != "s6":
        raise ValueError(f"kind is {kind!r}; expected 's6' or 'linear_attention'")
    return simplified_s6(numbers(d, n), numbers(n, d), numbers(n, d), numbers(d), **options)


# ---- the probe ------------------------------------------------------------------------------------------------------


def layer_along_ray(mixer, x, channel: int = 0) -> Callable[[float], float]:
    """s -> the last token's output of a mixer for the input s x, (1 l d) or a map (1 y x d), in float64."""
    import copy

    import torch

    mixer, x = copy.deepcopy(mixer).double(), x.double()

    def function(s: float) -> float:
        with torch.no_grad():
            y = mixer(s * x)
        return float((y[0] if isinstance(y, tuple) else y).flatten(1, -2)[0, -1, channel])

    return function


def probe(subject):
    """How fast the coefficients of trained layers fall along a ray, against simplified layers and linear attention."""
    import torch

    from ssmzoo.probes import figures
    from ssmzoo.probes.subject import Finding
    from ssmzoo.probes.tap import tap

    seen: dict[str, torch.Tensor] = {}  # input of every module

    def see(name: str):
        def hook(module, inputs):
            if inputs and isinstance(inputs[0], torch.Tensor):
                seen[name] = inputs[0][:1, :32]

        return hook

    hooks = [m.register_forward_pre_hook(see(n)) for n, m in subject.model.named_modules()]
    try:
        with torch.no_grad(), tap(subject.model, layers=subject.layers, rows=1) as scans:
            subject.model(subject.inputs[:1])
    finally:
        for hook in hooks:
            hook.remove()
    for name in dict.fromkeys(s.name for s in scans):
        if name in seen and not seen[name].is_floating_point():  # ids of an automaton's symbols
            width = subject.model.get_submodule(name).d_input
            seen[name] = torch.nn.functional.one_hot(seen[name], width).float()
    names = [n for n in dict.fromkeys(s.name for s in scans) if n in seen and seen[n].ndim > 2][:5]
    curves, reasons = {}, []
    for n in names:
        try:
            curves[n] = chebyshev(layer_along_ray(subject.model.get_submodule(n), seen[n] / seen[n].abs().max()), 24)
        except TypeError as error:  # a mixer that needs more than its input
            reasons.append(f"{n}: {error}")
    if not curves:
        raise ValueError(
            f"{type(subject.model).__name__} has no mixer of tokens alone to take along a ray {'; '.join(reasons[:1])}"
        )
    rng = np.random.default_rng(0)
    x = rng.normal(size=(8, 3))
    curves["simplified S6, 8 tokens"] = chebyshev(lambda s: random_layer("s6", 3, 2)(s * x)[-1, 0], 24)
    curves["linear attention"] = chebyshev(lambda s: random_layer("linear_attention", 3, 2)(s * x)[-1, 0], 24)
    finding = Finding({f"{n}: last coefficient above 1e-6": str(degree_above(c)) for n, c in curves.items()})
    for tokens in (8, 64, 512):
        least = max(separation(tokens)[1:3])
        finding.summary[f"layers of linear attention to couple {tokens} tokens"] = f"at least {least}"
    figure, axes = figures.canvas(1, 1, (6, 4))
    figures.lines(
        axes[0, 0],
        range(24),
        {n: np.maximum(c, 1e-18) for n, c in curves.items()},
        "degree",
        "|Chebyshev coefficient|, largest = 1",
        "layers along a ray of their input",
        yscale="log",
    )
    finding.figures["polynomial"] = figure
    finding.tables["coefficients"] = (
        ("degree", *curves),
        [(i, *(f"{c[i]:.3e}" for c in curves.values())) for i in range(24)],
    )
    return finding


def degree_above(coefficients: np.ndarray, tolerance: float = 1e-6) -> int:
    found = np.flatnonzero(coefficients > tolerance)
    return int(found[-1]) if len(found) else 0


# ---- what separates the layers --------------------------------------------------------------------------------------


class Separation(NamedTuple):
    """Layers of linear attention that a product of `degree` tokens needs at least, by degree and by coupled tokens; one
    simplified S6 layer reaches the degree at length `length`."""

    degree: int
    by_degree: int
    by_tokens: int
    length: int


def separation(tokens: int, order: int = 1) -> Separation:
    """For the monomial x_1 x_2 ... x_tokens: log_3 L by degree, log_3 (2 L - 1) by tokens that a monomial joins."""
    if tokens < 1:
        raise ValueError(f"tokens is {tokens}; a monomial has at least 1")
    by_degree = next(m for m in range(64) if 3**m >= tokens)
    by_tokens = next(m for m in range(64) if (3**m + 1) // 2 >= tokens)
    return Separation(tokens, by_degree, by_tokens, max(1, math.ceil((tokens - 4) / max(order, 1)) + 1))
