"""Text: what a language model writes, token by token; its state is carried from one press of a button to the next."""

from __future__ import annotations

import time

from ssmzoo.cli.demo_tabs import choice, subject

KIND = "text"
LONGEST, MOST = 20_000, 1000  # characters of a prompt, tokens at a time


def tab(gr, runs) -> None:
    with gr.Tab("Write"):
        with gr.Row():
            run = choice(gr, runs)
            tokens = gr.Slider(1, MOST, 200, step=1, label="tokens")
            temperature = gr.Slider(0, 2, 0.8, label="temperature (0: the likeliest)")
        prompt = gr.Textbox("def main(", label="what it reads", lines=3, max_length=LONGEST)
        with gr.Row():
            begin = gr.Button("Begin anew", variant="primary")
            onward = gr.Button("Read this and go on from the state")
        out = gr.Textbox(label="text so far", lines=14, max_lines=30, interactive=False)
        said = gr.Markdown()
        memory = gr.State(None)
        fields = [prompt, tokens, temperature]

        def anew(name, *given):
            yield from write(subject(runs[name]), None, *given)

        def further(name, held, *given):
            held = held if held and held["run"] is subject(runs[name]) else None
            yield from write(subject(runs[name]), held, *given)

        begin.click(anew, [run, *fields], [out, said, memory])
        onward.click(further, [run, memory, *fields], [out, said, memory])


def write(model_of, held, prompt: str, tokens: int, temperature: float):
    """(text so far, what to say, what is held) after every few tokens; `held` goes on from its state."""
    import torch

    from ssmzoo.inference.generate import Sampling, prefill
    from ssmzoo.layers.state import state_bytes

    model, tokenizer = model_of.model, model_of.tokenizer
    ids = tokenizer.encode(prompt[:LONGEST])
    if not ids and held is None:
        yield "", "Give it at least one character to read.", None
        return
    text, seen = (held["text"], held["seen"]) if held else ("", 0)
    state, logits = (held["state"], held["logits"]) if held else (None, None)
    start = time.perf_counter()
    if ids:
        logits, state = prefill(model, torch.tensor([ids]), state)
    read = time.perf_counter() - start
    text, seen = text + prompt[:LONGEST], seen + len(ids)
    decoder, sampling, generator = tokenizer.decoder(), Sampling(temperature=temperature), torch.Generator()
    start = time.perf_counter()
    for step in range(1, int(tokens) + 1):
        with torch.no_grad():
            token = sampling.draw(logits[:, : tokenizer.vocab_size], None, generator)
            logits, state, _ = model(token[:, None], state)
        logits = logits[:, -1]
        text += decoder.push(token.tolist())
        if step % 10 == 0 or step == int(tokens):
            rate = step / (time.perf_counter() - start)
            size = state_bytes(model, seen + step)
            said = (
                f"**{rate:,.0f} tokens/s** · read {len(ids)} tokens in {1000 * read:.0f} ms · the state after "
                f"{seen + step:,} tokens has {size:,} bytes"
            )
            yield text, said, {"run": model_of, "state": state, "logits": logits, "text": text, "seen": seen + step}
