"""Photographs: before and after under a slider, and what plain enlargement gives."""

from __future__ import annotations

import io
import time

from ssmzoo.cli.demo_tabs import choice, subject

KIND = "photographs"
LARGEST = 512 * 512  # pixels


def tab(gr, runs) -> None:
    with gr.Tab("Restore"):
        with gr.Row():
            with gr.Column(scale=1):
                run = choice(gr, runs)
                given = gr.Image(
                    type="pil",
                    image_mode="RGB",
                    sources=["upload", "clipboard"],
                    label="photograph, at most 512 x 512",
                    height=260,
                )
                with gr.Row():
                    example = gr.Button("One held out")
                    go = gr.Button("Restore", variant="primary")
            with gr.Column(scale=2):
                out = gr.ImageSlider(label="before | after", height=460)
                said = gr.Markdown()
        example.click(lambda name: damaged(subject(runs[name])), run, given)

        def press(name, picture):
            if picture is None:
                raise gr.Error("Choose a photograph first.")
            if picture.width * picture.height > LARGEST:
                raise gr.Error(f"{picture.width} x {picture.height} pixels are more than 512 x 512.")
            return restore(subject(runs[name]), picture)

        go.click(press, [run, given], [out, said])


def damaged(run):
    """A part of a photograph that training never saw, damaged as the run's data are."""
    import numpy as np
    from PIL import Image

    from ssmzoo.data.photos import embedded_photo

    data = run.manifest["config"]["data"]
    clean = Image.fromarray(embedded_photo("coffee")).crop((120, 80, 440, 320))
    kind, scale = data.get("degradation", "bicubic"), run.model.upscale
    if kind == "jpeg":
        file, quality = io.BytesIO(), data.get("quality", 40)
        clean.save(file, "JPEG", quality=quality if isinstance(quality, int) else quality[0])
        return Image.open(io.BytesIO(file.getvalue()))
    if kind == "noise":
        sigma = data.get("sigma", 25)
        sigma = sigma if isinstance(sigma, (int, float)) else sigma[0]
        noise = np.random.default_rng(0).normal(0, sigma, (clean.height, clean.width, 3))
        return Image.fromarray((np.asarray(clean) + noise).clip(0, 255).round().astype("uint8"))
    return clean.resize((clean.width // scale, clean.height // scale), Image.Resampling.BICUBIC)


def restore(run, picture):
    """((before, after), what to say); before is enlarged without a model."""
    import numpy as np
    from PIL import Image

    from ssmzoo.data.picture import Picture
    from ssmzoo.inference.restore import restore_picture

    start = time.perf_counter()
    levels = np.array(picture.convert("RGB"))
    if grey := getattr(run.model, "in_chans", 3) == 1:
        levels = np.array(picture.convert("L"))[..., None]
    after = restore_picture(run.model, Picture(levels)).image8()
    before = picture.convert("L" if grey else "RGB").resize(after.size, Image.Resampling.BICUBIC)
    took = time.perf_counter() - start
    words = "bicubic" if after.size != picture.size else "as given"
    return (before, after), f"left: {words}, right: restored · {after.width} x {after.height} pixels in {took:.1f} s"
