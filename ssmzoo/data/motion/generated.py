"""Motion that follows the beats of a synthesised sound, by seed: what of it can be heard is known exactly.

A clip has beats at a tempo of 40 to 60 a minute, each at most 8 % of an interval early or late, loud or soft. The
sound is a decaying tone at every beat over noise. Every joint circles around its rest; on a beat it is slowest (0.4 of
its mean speed) and between beats fastest (1.6), so that beats can be seen, and circles are wider after loud beats. The
jaw and the expressions follow the loudness. Words: 1 after a soft beat, 2 after a loud one, 0 before the first.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ssmzoo.data.motion.skeleton import FPS, HANDS, JAW, JOINTS, LOWER, UPPER, whole_motion

RATE, PER_FRAME = 16000, 533  # samples a second, a frame
SPREAD = {UPPER: 0.35, HANDS: 0.12, LOWER: 0.05}  # radians
STYLE_SEED = 2024  # of what all clips share: axes of the joints, the face's answer to loudness


class Clip(NamedTuple):
    """audio (samples 3), word (l), whole (l 337), expression (l 100), beats in seconds, speaker."""

    audio: Tensor
    word: Tensor
    whole: Tensor
    expression: Tensor
    beats: np.ndarray
    speaker: int


def envelope(wave: np.ndarray, width: int = 1024) -> np.ndarray:
    """The largest |x| of the following `width` samples."""
    padded = np.concatenate([np.abs(wave), np.zeros(width - 1)])
    return np.lib.stride_tricks.sliding_window_view(padded, width).max(-1)


def clip(frames: int, speaker: int, rng: np.random.Generator) -> Clip:
    """One clip of `frames` frames at 30 a second."""
    seconds = frames / FPS
    interval = 60 / rng.uniform(40, 60)
    count = int(seconds / interval) + 2
    beats = (np.arange(count) + rng.uniform(0.1, 0.9) + rng.uniform(-0.08, 0.08, count)) * interval
    loud = rng.random(count) < 0.5
    wave = _sound(frames * PER_FRAME, beats, loud, rng)
    times = np.arange(frames) / FPS
    grid = np.concatenate([[beats[0] - interval], beats])
    phase = np.interp(times, grid, np.arange(count + 1)) - 1  # whole numbers on beats
    turn = 2 * np.pi * phase - 0.6 * np.sin(2 * np.pi * phase)  # speed 1 - 0.6 cos: slowest on a beat
    level = np.interp(times, beats + 0.1, np.where(loud, 1.0, 0.5))
    whole, expression = _motion(turn, level, speaker)
    last = np.searchsorted(beats, times, side="right") - 1
    word = np.where(last < 0, 0, 1 + loud[np.maximum(last, 0)])
    heard = np.stack([envelope(wave), np.zeros_like(wave), wave / max(1e-6, np.abs(wave).max())], -1)
    return Clip(torch.from_numpy(heard).float(), torch.from_numpy(word), whole, expression, beats, speaker)


def _sound(samples: int, beats: np.ndarray, loud: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    wave = 0.01 * rng.normal(size=samples)
    t = np.arange(int(0.25 * RATE)) / RATE
    for beat, strong in zip(beats, loud):
        start = int(beat * PER_FRAME * FPS)
        tone = (0.9 if strong else 0.4) * np.exp(-t / 0.05) * np.sin(2 * np.pi * 440 * t)
        part = wave[start : start + len(tone)]
        part += tone[: len(part)]
    return wave


def _motion(turn: np.ndarray, level: np.ndarray, speaker: int) -> tuple[Tensor, Tensor]:
    style = np.random.default_rng([STYLE_SEED, speaker])
    poses = np.zeros((len(turn), JOINTS, 3))
    for joints, spread in SPREAD.items():
        for joint in joints:
            axes, shift = np.linalg.qr(style.normal(size=(3, 2)))[0], style.uniform(0, 2 * np.pi)
            circle = np.stack([np.cos(turn / 2 + shift), np.sin(turn / 2 + shift)], -1)
            poses[:, joint] = spread * style.uniform(0.6, 1) * level[:, None] * circle @ axes.T
    poses[:, JAW, 0] = 0.3 * level
    expression = level[:, None] * style.normal(size=100) + 0.2 * np.sin(turn)[:, None] * style.normal(size=100)
    place = np.stack([0.05 * np.sin(turn / 4), 0.01 * level, np.zeros_like(turn)], -1)
    whole = whole_motion(torch.from_numpy(poses).float(), torch.from_numpy(place).float())
    return whole, torch.from_numpy(expression).float()
