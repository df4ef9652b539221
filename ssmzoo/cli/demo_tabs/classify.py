"""Pictures with classes: what the model says, and which parts made it say so."""

from __future__ import annotations

from ssmzoo.cli.demo_tabs import choice, subject

KIND = "pictures"


def tab(gr, runs) -> None:
    with gr.Tab("Classify"):
        with gr.Row():
            with gr.Column(scale=1):
                run = choice(gr, runs)
                given = gr.Image(
                    type="pil", image_mode="RGB", sources=["upload", "clipboard"], label="picture", height=260
                )
                with gr.Row():
                    example = gr.Button("A digit")
                    go = gr.Button("Classify", variant="primary")
                found = gr.Label(num_top_classes=5, label="classes")
            with gr.Column(scale=2):
                gr.Markdown("Which parts made it say so:")
                maps = gr.Plot(show_label=False)
        example.click(digit, None, given)

        def press(name, picture):
            if picture is None:
                raise gr.Error("Choose a picture first.")
            return classify(subject(runs[name]), picture)

        go.click(press, [run, given], [found, maps])


def digit():
    """One of scikit-learn's digits, another every time."""
    import random

    from PIL import Image
    from sklearn.datasets import load_digits

    picture = random.choice(load_digits().images)
    return Image.fromarray((picture * 15.9).astype("uint8")).resize((128, 128), Image.Resampling.BICUBIC)


def classify(run, picture):
    """({class: probability}, figure with attribution maps)."""
    import torch

    from ssmzoo.inference.predict import channels_of, transform_of
    from ssmzoo.probes.entry import enter
    from ssmzoo.probes.explain import METHODS, explain
    from ssmzoo.probes.relevance import scores_figure
    from ssmzoo.probes.subject import Subject

    picture = picture.convert("L" if channels_of(run) == 1 else "RGB")
    image = transform_of(run)(picture)[None]
    with torch.no_grad():
        shares = run.model(image).softmax(-1)[0]
    target = shares.argmax()[None]
    entry = enter(run.model, image)
    scores = {}
    for method in METHODS:
        try:
            scores[method] = explain(entry, target, method, max_channels=16)
        except ValueError:  # of models without such a matrix
            continue
    figure = scores_figure(Subject(run.model, image), entry, scores)
    return {run.class_name(i): float(p) for i, p in enumerate(shares)}, figure
