"""The embedded series: a real recording of a neuron's membrane potential, with anomalies injected by seed.

The recording is matplotlib's sample file membrane.dat (12,000 values, one channel). Of its regular firing, values
1500 to 4700 train and 4700 to 7180 test. The anomalies are ours, the recording has no labels: `per_kind` of each kind
are put at random places of the test part, at least GAP points apart, in standard deviations of the training part:

    spike      1 to 3 points raised or lowered by 3 to 5
    bump       15 to 30 points raised or lowered by a raised cosine of height 0.8 to 1.5
    frozen     20 to 50 points that keep the value before them
    fast       20 to 40 points that run through twice the time
    mirrored   30 to 60 points in reverse order
    noise      20 to 40 points with normal noise of deviation 0.3
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

START, SPLIT, END = 1500, 4700, 7180
GAP = 40
LENGTHS = {
    **{"spike": (1, 3), "bump": (15, 30), "frozen": (20, 50)},
    **{"fast": (20, 40), "mirrored": (30, 60), "noise": (20, 40)},
}


def recording() -> tuple[np.ndarray, np.ndarray]:
    """(train (t 1), test (t 1)) float64, as recorded."""
    import matplotlib

    file = Path(matplotlib.get_data_path()) / "sample_data" / "membrane.dat"
    if not file.is_file():
        raise ValueError(f"matplotlib's sample recording {file} is missing; give a series of yours as data.path")
    values = np.fromfile(file, np.float32).astype(np.float64)[:, None]
    return values[START:SPLIT], values[SPLIT:END]


def inject(test: np.ndarray, unit: float, per_kind: int, seed: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """(test with anomalies, labels (t) bool, what was done, one line each). unit: the training part's deviation."""
    rng = np.random.default_rng([seed, 77])
    kinds = [kind for kind in LENGTHS for _ in range(per_kind)]
    lengths = {i: int(rng.integers(LENGTHS[kind][0], LENGTHS[kind][1] + 1)) for i, kind in enumerate(kinds)}
    out, labels, notes = test.copy(), np.zeros(len(test), dtype=bool), []
    order = rng.permutation(len(kinds))
    free = len(test) - sum(lengths.values()) - GAP * (len(kinds) + 2)
    if free < 0:
        raise ValueError(f"data.per_kind = {per_kind}: {len(kinds)} anomalies do not fit into {len(test)} points")
    gaps = np.diff(np.sort(rng.integers(0, free + 1, len(kinds))), prepend=0)
    position = GAP
    for gap, index in zip(gaps, order):
        start, length, kind = position + int(gap), lengths[index], kinds[index]
        out[start : start + length, 0] = _altered(kind, test[:, 0], start, length, unit, rng)
        labels[start : start + length] = True
        notes.append(f"{kind} at {start}, {length} points")
        position = start + length + GAP
    return out, labels, notes


def _altered(kind: str, x: np.ndarray, start: int, n: int, unit: float, rng: np.random.Generator) -> np.ndarray:
    part, sign = x[start : start + n], rng.choice([-1.0, 1.0])
    if kind == "spike":
        return part + sign * rng.uniform(3, 5) * unit
    if kind == "bump":
        return part + sign * rng.uniform(0.8, 1.5) * unit * (0.5 - 0.5 * np.cos(2 * np.pi * (np.arange(n) + 0.5) / n))
    if kind == "frozen":
        return np.full(n, x[start - 1])
    if kind == "fast":
        return x[start : start + 2 * n : 2]
    if kind == "mirrored":
        return part[::-1]
    return part + rng.normal(0, 0.3 * unit, n)
