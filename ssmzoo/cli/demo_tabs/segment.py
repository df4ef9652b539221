"""Masks and boxes: what a model of dense prediction finds, drawn over the picture, and which pixels made it say so."""

from __future__ import annotations

import tempfile
from pathlib import Path

from ssmzoo.cli.demo_tabs import choice, subject

KIND = "dense"
LARGEST = 1024 * 1024  # pixels
SHOWN = 4  # things whose pixels are shown
SURE = 0.3  # score of an object
FEW = 0.005  # share of the pixels, below which a class is no finding
LEGIBLE = 400  # pixels, to which small pictures are enlarged


def tab(gr, runs) -> None:
    with gr.Tab("Segment"):
        with gr.Row():
            with gr.Column(scale=1):
                run = choice(gr, runs)
                given = gr.Image(
                    type="pil", image_mode="RGB", sources=["upload", "clipboard"], label="picture", height=300
                )
                with gr.Row():
                    example = gr.Button("Some digits")
                    go = gr.Button("Find", variant="primary")
            with gr.Column(scale=2):
                out = gr.Image(label="found", height=400, buttons=["download", "fullscreen"])
                said = gr.Markdown()
                gr.Markdown("Which pixels move the score of what was found:")
                maps = gr.Plot(show_label=False)
        example.click(lambda name: scene(subject(runs[name])), run, given)

        def press(name, picture):
            if picture is None:
                raise gr.Error("Choose a picture first.")
            if picture.width * picture.height > LARGEST:
                raise gr.Error(f"{picture.width} x {picture.height} pixels are more than 1024 x 1024.")
            return *find(subject(runs[name]), picture), reasons(subject(runs[name]), picture)

        go.click(press, [run, given], [out, said, maps])


def scene(run):
    """Handwritten digits on a photograph, neither of which training saw, in the size of the run's pictures."""
    import random

    from PIL import Image

    from ssmzoo.data.dense.digits import digit_scenes

    size = (run.manifest["config"].get("data") or {}).get("image_size")
    _, held_out = digit_scenes(size if isinstance(size, int) else 64, 1, 200, 0.2, 0)
    return Image.fromarray(held_out.read(random.randrange(200), 0).image)


def find(run, picture):
    """(picture with what was found drawn over it, the same in words)."""
    from PIL import Image

    from ssmzoo.inference.predict_dense import predict_dense

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "picture.png"
        picture.save(file)
        found = list(predict_dense(run, [file], Path(folder) / "drawn", min_score=SURE))
        with Image.open(found[0].written[0]) as drawn:
            drawn = drawn.convert("RGB")
    if times := LEGIBLE // max(drawn.size):
        drawn = drawn.resize((times * drawn.width, times * drawn.height), Image.Resampling.NEAREST)
    words = " · ".join(f"**{name}** {100 * share:.1f} %" for name, share, _ in found[0].found[:8])
    return drawn, words or "nothing found"


def reasons(run, picture):
    """A figure with a map |d score / d pixel| for each of the largest classes, or surest objects, found; or None."""
    import matplotlib
    import numpy as np
    import torch

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    leaf = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).float().div(255).requires_grad_()
    scores = scores_of(run, leaf)
    if not scores:
        return None
    wide = 1 + len(scores)
    figure, axes = plt.subplots(1, wide, figsize=(2.2 * wide, 2.5), layout="constrained")
    axes[0].imshow(picture)
    axes[0].set_title("picture", fontsize=9)
    for axis, (name, score) in zip(axes[1:], scores):
        (gradient,) = torch.autograd.grad(score, leaf, retain_graph=True)
        axis.imshow(gradient.abs().sum(0).numpy(), cmap="inferno")
        axis.set_title(name, fontsize=9)
    for axis in axes:
        axis.axis("off")
    plt.close(figure)
    return figure


def scores_of(run, image):
    """[(name, score)] of what is found in an image (c y x): logits over a class's pixels, or an object's score."""
    from ssmzoo.inference.predict_dense import pixel_scores
    from ssmzoo.models.segmenter import Segmenter

    if not isinstance(run.model, Segmenter):
        objects = run.model([image])[0]
        named = zip(objects["labels"].tolist(), objects["scores"])
        return [(f"{run.class_name(c)} {100 * s.item():.0f}", s) for c, s in named if s >= SURE][:SHOWN]
    scores = pixel_scores(run, image, run.picture.size)
    classes = scores.argmax(0)
    shares = [(int((classes == c).sum()), c) for c in range(1, len(scores))]
    largest = sorted((s for s in shares if s[0] > FEW * classes.numel()), reverse=True)[:SHOWN]
    return [(run.class_name(c), scores[c][classes == c].sum()) for _, c in largest]
