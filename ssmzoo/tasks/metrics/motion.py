"""How well motion fits its sound and others' motion: beat consistency, diversity, Frechet distance, the face.

Positions are (l j 3) in metres at 30 frames a second. Source: MambaTalk's evaluation
(project @b3c30e4, utils/metric.py).
"""

from __future__ import annotations

import numpy as np

FPS, DROPPED, ORDER, SIGMA, LEAST = 30, 60, 7, 0.3, 0.3


def beat_consistency(positions: np.ndarray, beats: np.ndarray, joints) -> float:
    """Mean over the sound's beats (seconds) of exp(-d^2 / (2 0.3^2)), d the seconds to the nearest beat of a joint,
    averaged over joints.

    A joint's beats are local minima (over 7 frames to both sides) of its speed over its mean speed, above 0.3. The
    first and last 60 frames are left out. A joint without a beat counts 0; no beat of the sound: NaN.
    """
    from scipy.signal import argrelextrema

    heard = beats[(beats >= DROPPED / FPS) & (beats < (len(positions) - DROPPED) / FPS)]
    if not len(heard):
        return float("nan")
    speed = np.linalg.norm(np.diff(positions, axis=0), axis=-1)  # (l-1 j)
    speed = speed / np.maximum(speed.mean(0), 1e-9)
    found = []
    for joint in joints:
        low = argrelextrema(speed[:, joint], np.less, order=ORDER)[0]
        low = low[(speed[low, joint] > LEAST) & (low >= DROPPED) & (low < len(positions) - DROPPED)]
        nearest = np.abs(heard[:, None] - low[None] / FPS).min(1) if len(low) else np.full(len(heard), np.inf)
        found.append(np.exp(-np.square(nearest) / (2 * SIGMA**2)).mean())
    return float(np.mean(found))


def diversity(sequences: list[np.ndarray]) -> float:
    """Sum over frames and coordinates of |x - mean over the sequence|, over the number of frames; metres."""
    total = sum(np.abs(s - s.mean(0)).sum() for s in sequences)
    return float(total / sum(len(s) for s in sequences))


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """Squared Frechet distance between Gaussian fits of features (n d)."""
    from scipy.linalg import sqrtm

    means, spreads = zip(*((x.mean(0), np.cov(x, rowvar=False)) for x in (a, b)))
    root = np.real(sqrtm(spreads[0] @ spreads[1]))
    return float(np.square(means[0] - means[1]).sum() + np.trace(spreads[0] + spreads[1] - 2 * root))


def face_error(got: np.ndarray, truth: np.ndarray) -> float:
    """Mean squared error of a face's channels (l c)."""
    return float(np.square(got - truth).mean())


def face_velocity(got: np.ndarray, truth: np.ndarray) -> float:
    """L1 of changes as released: (got[t+1] - truth[t]) against (truth[t+1] - truth[t]), which mixes both."""
    return float(np.abs((got[1:] - truth[:-1]) - (truth[1:] - truth[:-1])).mean())
