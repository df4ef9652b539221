"""Masks and boxes: what a model of dense prediction finds, drawn over the picture."""

from __future__ import annotations

import tempfile
from pathlib import Path

from ssmzoo.cli.demo_tabs import choice, subject

KIND = "dense"
LARGEST = 2048 * 2048  # pixels


def tab(gr, runs) -> None:
    with gr.Tab("Segment"):
        with gr.Row():
            with gr.Column(scale=1):
                run = choice(gr, runs)
                given = gr.Image(
                    type="pil", image_mode="RGB", sources=["upload", "clipboard"], label="picture", height=300
                )
                go = gr.Button("Find", variant="primary")
            with gr.Column(scale=2):
                out = gr.Image(label="found", height=460)
                said = gr.Markdown()

        def press(name, picture):
            if picture is None:
                raise gr.Error("Choose a picture first.")
            if picture.width * picture.height > LARGEST:
                raise gr.Error(f"{picture.width} x {picture.height} pixels are more than 2048 x 2048.")
            return find(subject(runs[name]), picture)

        go.click(press, [run, given], [out, said])


def find(run, picture):
    """(picture with what was found drawn over it, the same in words)."""
    from PIL import Image

    from ssmzoo.inference.predict_dense import predict_dense

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "picture.png"
        picture.save(file)
        found = list(predict_dense(run, [file], Path(folder) / "drawn"))
        with Image.open(found[0].written[0]) as drawn:
            drawn = drawn.convert("RGB")
    words = ", ".join(f"{name} {100 * share:.1f} %" for name, share, _ in found[0].found[:8])
    return drawn, words or "nothing found"
