"""Folders of BEAT2 for those who have its licences: NAME.npz (SMPL-X) with NAME.wav beside it, in one folder or under
smplxflame_30/ and wave16k/.

Of an .npz: poses (l 165) axis-angles, trans (l 3) metres, expressions (l 100), at 30 frames a second. Words are not
read: all are word 0. Nothing in a file is run.
"""

from __future__ import annotations

import wave
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch

from ssmzoo.data.motion.generated import PER_FRAME, RATE, Clip, envelope
from ssmzoo.data.motion.skeleton import FPS, JOINTS, whole_motion


def read_clips(path: str) -> list[Clip]:
    """Every clip of a folder. Raises ValueError, naming the file, for what does not fit together."""
    folder = Path(path).expanduser()
    motions = sorted({*folder.glob("*.npz"), *folder.glob("smplxflame_30/*.npz")})
    if not motions:
        raise ValueError(
            f"data.path = {path!r} holds no NAME.npz with NAME.wav (BEAT2); leave it out for generated motion"
        )
    return [_clip(file, folder) for file in motions]


def _clip(file: Path, folder: Path) -> Clip:
    sounds = [place / f"{file.stem}.wav" for place in (file.parent, folder / "wave16k")]
    sound = next((s for s in sounds if s.is_file()), None)
    if sound is None:
        raise ValueError(f"{file} has no sound {file.stem}.wav beside it or in wave16k")
    try:
        with np.load(file, allow_pickle=False) as found:
            poses, place = (np.asarray(found[k], np.float32) for k in ("poses", "trans"))
            face = np.asarray(found["expressions"], np.float32)
            rate = float(found["mocap_frame_rate"]) if "mocap_frame_rate" in found else FPS
    except (KeyError, ValueError, OSError, EOFError, BadZipFile) as error:
        what = error.args[0] if isinstance(error, KeyError) else "it is damaged, or no .npz file of numbers"
        raise ValueError(f"{file}: {what}; expected poses (l 165), trans (l 3) and expressions (l 100)") from None
    if poses.shape[1:] != (3 * JOINTS,) or place.shape != (len(poses), 3) or face.shape != (len(poses), 100):
        shapes = f"{poses.shape}, {place.shape}, {face.shape}"
        raise ValueError(f"{file}: poses, trans, expressions are {shapes}; expected (l 165), (l 3), (l 100)")
    for name, values in (("poses", poses), ("trans", place), ("expressions", face)):
        if len(off := np.argwhere(~np.isfinite(values))):
            frame, channel = off[0]
            raise ValueError(f"{file}: {name} hold {values[frame, channel]} in frame {frame}, channel {channel}")
    if rate != FPS:
        raise ValueError(f"{file} has {rate:g} frames a second; expected {FPS}")
    samples, frames = _samples(sound), len(poses)
    if abs(len(samples) / PER_FRAME - frames) > FPS:
        heard = len(samples) / RATE
        raise ValueError(f"{sound} lasts {heard:.1f} s and {file.name} {frames / FPS:.1f} s; both must belong together")
    frames = min(frames, len(samples) // PER_FRAME)
    samples = samples[: frames * PER_FRAME]
    heard = np.stack([envelope(samples), np.zeros_like(samples), samples / max(1e-6, np.abs(samples).max())], -1)
    whole = whole_motion(torch.from_numpy(poses[:frames]).unflatten(-1, (JOINTS, 3)), torch.from_numpy(place[:frames]))
    word = torch.zeros(frames, dtype=torch.long)
    audio = torch.from_numpy(heard).float()
    return Clip(audio, word, whole, torch.from_numpy(face[:frames]), _onsets(samples), _speaker(file.stem))


def _samples(file: Path) -> np.ndarray:
    """16-bit samples in [-1, 1]."""
    try:
        with wave.open(str(file)) as sound:
            rate, channels, width = sound.getframerate(), sound.getnchannels(), sound.getsampwidth()
            raw = sound.readframes(sound.getnframes())
    except (wave.Error, EOFError) as error:
        raise ValueError(f"{file} is no WAV file ({error})") from None
    if (rate, channels, width) != (RATE, 1, 2):
        raise ValueError(
            f"{file} has {rate} samples a second, {channels} channel(s) of {8 * width} bits; expected {RATE}, one, 16: "
            f"resample it first, as with `ffmpeg -i IN -ar {RATE} -ac 1 OUT.wav`"
        )
    return np.frombuffer(raw, np.int16).astype(np.float64) / 32768


def _onsets(samples: np.ndarray) -> np.ndarray:
    """Seconds at which the sound's energy jumps: rises of its logarithm over hops of 512 above their mean + 1.5 sd."""
    hops = samples[: len(samples) // 512 * 512].reshape(-1, 512)
    rise = np.maximum(0, np.diff(np.log(1e-6 + np.square(hops).mean(1)), prepend=0))
    peak = (rise > np.roll(rise, 1)) & (rise >= np.roll(rise, -1)) & (rise > rise.mean() + 1.5 * rise.std())
    return np.flatnonzero(peak) * 512 / RATE


def _speaker(name: str) -> int:
    """The number in front of a BEAT2 name (2_scott_0_1_1)."""
    first = name.split("_")[0]
    return int(first) - 1 if first.isdigit() and 1 <= int(first) <= 25 else 0
