"""Pictures of motion: heights and places of joints over time with the sound's beats, and the skeleton moving."""

from __future__ import annotations

from pathlib import Path

import numpy as np

FPS = 30
SHOWN = {"left wrist": 20, "right wrist": 21, "head": 15}


def draw_trajectories(png: Path, got: np.ndarray, truth: np.ndarray, beats: np.ndarray) -> Path:
    """got, truth (l j 3) in metres; returns `png`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(SHOWN), 1, figsize=(12, 6.5), sharex=True, constrained_layout=True)
    time = np.arange(len(got)) / FPS
    for ax, (name, joint) in zip(axes, SHOWN.items()):
        ax.plot(time, truth[:, joint, 0], color="#8a8a8a", linewidth=1.2, label="true")
        ax.plot(time, got[:, joint, 0], color="#c23b22", linewidth=1.0, label="generated")
        for i, beat in enumerate(beats[beats < time[-1]]):
            ax.axvline(beat, color="#30506f", linewidth=0.6, alpha=0.5, label="beats of the sound" if i == 0 else None)
        ax.set_ylabel(f"{name}\nsideways (m)", fontsize=8)
    axes[0].legend(loc="upper right", fontsize=7, ncols=3)
    axes[-1].set_xlabel("seconds")
    figure.savefig(png, dpi=110)
    plt.close(figure)
    return png


def draw_gif(file: Path, got: np.ndarray, truth: np.ndarray, parent, frames: int = 90, every: int = 3) -> Path:
    """Generated motion on the left, true on the right, seen from the front; ten pictures a second; returns `file`."""
    from PIL import Image, ImageDraw

    pictures = []
    for t in range(0, min(frames, len(got)), every):
        image = Image.new("L", (360, 260), 255)
        draw = ImageDraw.Draw(image)
        for middle, joints, title in ((90, got[t], "generated"), (270, truth[t], "true")):
            at = [(middle + 110 * x, 240 - 120 * y) for x, y in joints[:, :2].tolist()]
            for joint, up in enumerate(parent):
                if up >= 0:
                    draw.line([at[up], at[joint]], fill=0, width=2 if joint < 25 else 1)
            draw.text((middle - 28, 4), title, fill=90)
        pictures.append(image)
    pictures[0].save(file, save_all=True, append_images=pictures[1:], duration=1000 * every // FPS, loop=0)
    return file
