"""Regular languages: SD-SSM's state walks through the automaton, symbol by symbol."""

from __future__ import annotations

import math

from ssmzoo.cli.demo_tabs import choice, subject

KIND = "automaton"
MOST = 200  # symbols


def tab(gr, runs) -> None:
    with gr.Tab("Walk"):
        with gr.Row():
            run = choice(gr, runs)
            word = gr.Textbox(label="symbols, with spaces between", max_length=2000, scale=3)
            fresh = gr.Button("Draw at random")
        with gr.Row():
            step = gr.Slider(0, 12, 0, step=1, label="symbols read")
            forward = gr.Button("Next symbol", variant="primary")
        said = gr.Markdown()
        picture = gr.Plot(show_label=False)

        def draw_at(name, text, at):
            try:
                return walk(subject(runs[name]), text.split(), max(1, int(at)))
            except ValueError as error:
                raise gr.Error(str(error)) from None

        def drawn(name):
            text = " ".join(random_word(subject(runs[name])))
            return text, gr.Slider(0, len(text.split()), 1, step=1), *draw_at(name, text, 1)

        def onward(name, text, at):
            at = min(int(at) + 1, max(1, len(text.split())))
            return gr.Slider(0, max(1, len(text.split())), at, step=1), *draw_at(name, text, at)

        fresh.click(drawn, run, [word, step, said, picture])
        forward.click(onward, [run, word, step], [step, said, picture])
        step.release(draw_at, [run, word, step], [said, picture])


def random_word(run, length: int = 12) -> list[str]:
    import numpy as np

    from ssmzoo.probes.expressivity import language

    automaton = language(run.manifest["config"]["data"])
    ids, _ = automaton.draw(np.random.default_rng(), 1, length)
    return [short(automaton)[i] for i in ids[0]]


def short(automaton) -> list[str]:
    """The symbols by their first words, numbered where those are not their own."""
    first = [s.split()[0] if s.split() else s for s in automaton.symbols]
    return first if len(set(first)) == len(first) else [str(i) for i in range(len(first))]


def walk(run, word: list[str], at: int):
    """(what to say, figure) after the first `at` symbols. ValueError for symbols that are none."""
    import numpy as np
    import torch

    from ssmzoo.probes.expressivity import draw, language

    automaton = language(run.manifest["config"]["data"])
    if not 0 < len(word) <= MOST:
        raise ValueError(f"give 1 to {MOST} symbols out of {', '.join(short(automaton))}")
    names = short(automaton)
    if foreign := next((s for s in word if s not in names), None):
        raise ValueError(f"{foreign!r} is not in the alphabet {', '.join(names)}")
    ids = np.array([[names.index(s) for s in word]])
    truth = [automaton.initial_state, *automaton.run(ids)[0].tolist()]
    with torch.no_grad():
        cloud_ids, cloud_states = draw(automaton, 64, 30)
        cloud, _ = run.model.block(cloud_ids)
        path, _ = run.model.block(torch.from_numpy(ids))
        logits = run.model(torch.from_numpy(ids)).logits[0, :, : automaton.num_classes]
    centred = cloud.flatten(0, 1)
    mean = centred.mean(0)
    axes = torch.linalg.svd(centred - mean, full_matrices=False)[2][:2].T
    answers, at = logits.argmax(-1).tolist(), min(at, len(word))
    wanted = automaton.output[truth[at]]
    verdict = "right" if answers[at - 1] == wanted else "wrong"
    said = (
        f"read **{' '.join(word[:at])}** · the automaton is in state {truth[at]}, "
        f"**{automaton.state_names[truth[at]]}** · the model answers class **{answers[at - 1]}**: {verdict}"
    )
    points = (cloud - mean) @ axes, cloud_states, ((path[0] - mean) @ axes)[:at]
    return said, figure(automaton, truth[: at + 1], points)


def figure(automaton, truth: list[int], points):
    """Left the automaton with the way so far, right the model's states in two dimensions with the same way."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(11, 5), layout="constrained")
    left, right = drawn.subplots(1, 2)
    q = automaton.num_states
    at = [(math.cos(2 * math.pi * i / q), math.sin(2 * math.pi * i / q)) for i in range(q)]
    for row, state in enumerate(automaton.delta.tolist()):
        for target in (t for t in state if t >= 0 and t != row):
            arrow(left, at[row], at[target], "#c9d2d6", 1)
    for before, after in zip(truth, truth[1:]):
        arrow(left, at[before], at[after], "#D55E00", 2)
    long = max(map(len, automaton.state_names)) > 6
    for i, (x, y) in enumerate(at):
        left.scatter(x, y, s=700, color="#00796b" if i == truth[-1] else "#e4eaed", edgecolor="#66737b", zorder=3)
        ink = "white" if i == truth[-1] else "black"
        left.text(
            x, y, i if long else automaton.state_names[i], ha="center", va="center", color=ink, zorder=4, fontsize=8
        )
    left.set(xlim=(-1.3, 1.3), ylim=(-1.3, 1.3), title=automaton.name)
    left.set_aspect("equal")
    left.set_axis_off()
    cloud, states, path = points
    right.scatter(*cloud.flatten(0, 1).T, c=states.flatten(), cmap="tab20", s=10, alpha=0.5)
    right.plot(*path.T, color="#D55E00", linewidth=1, alpha=0.7)
    right.scatter(*path[-1:].T, color="#D55E00", s=120, marker="*", zorder=3)
    right.set(title="states of SD-SSM, coloured by the automaton's", xticks=[], yticks=[])
    return drawn


def arrow(axis, start, end, colour: str, width: float) -> None:
    style = {"arrowstyle": "-|>", "color": colour, "lw": width, "shrinkA": 16, "shrinkB": 16}
    axis.annotate("", end, start, arrowprops=style | {"connectionstyle": "arc3,rad=0.12"})
