"""Motion that follows the beats of a synthesised sound, by seed: what of it can be heard is known exactly.

A clip has beats at a tempo of 40 to 60 a minute, each at most 8 % of an interval early or late, loud or soft. The
sound is a decaying tone at every beat over noise. Every joint goes round its rest once from beat to beat, slowest on a
beat (half its mean speed) and fastest between two, so that beats can be seen: trunk and arms as wide as ever, hands and
legs wider around loud beats, and jaw and expressions follow the loudness. Joints turn about the two level axes, so that
what hangs on them goes round level circles, whose sums are circles again. Words: 1 after a soft beat, 2 after a loud
one, 0 before the first.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ssmzoo.data.motion.skeleton import FPS, HANDS, JAW, JOINTS, LOWER, UPPER, whole_motion

RATE, PER_FRAME = 16000, 533  # samples a second, a frame
TRUNK, ARMS = UPPER[:7], UPPER[7:]
SPREAD = {TRUNK: 0.12, ARMS: 0.35, HANDS: 0.35, LOWER: 0.1}  # radians
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
    turn = 2 * np.pi * phase - 0.5 * np.sin(2 * np.pi * phase)  # speed 1 - 0.5 cos: slowest on a beat
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
    side = style.uniform(0, 2 * np.pi)
    for joints, spread in SPREAD.items():
        for joint in joints:
            around = turn + side + style.uniform(-0.8, 0.8)
            wide = spread * style.uniform(0.6, 1) * (1.0 if joints is TRUNK or joints is ARMS else level)
            poses[:, joint, 0], poses[:, joint, 2] = wide * np.cos(around), wide * np.sin(around)
    poses[:, JAW, 0] = 0.3 * level
    expression = level[:, None] * style.normal(size=100) + 0.2 * np.sin(turn)[:, None] * style.normal(size=100)
    place = np.stack([0.05 * np.sin(turn + side), 0.01 * level, -0.05 * np.cos(turn + side)], -1)
    whole = whole_motion(torch.from_numpy(poses).float(), torch.from_numpy(place).float())
    return whole, torch.from_numpy(expression).float()
