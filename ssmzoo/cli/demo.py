"""`ssmzoo demo [RUN ...]`: trained models in a browser, on this machine alone; a tab for every kind of run there is."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path

TABS = ("write", "restore", "classify", "segment", "walk")  # files of demo_tabs, each with KIND and tab(gr, runs)
KINDS = {
    "LanguageModeling": "text",
    "PrefixLanguageModeling": "text",
    "Birdie": "text",
    "Restoration": "photographs",
    "ImageClassification": "pictures",
    "SemanticSegmentation": "dense",
    "ObjectDetection": "dense",
}
UPLOAD = "10mb"  # of a file
CSS = "textarea { font-family: ui-monospace, 'DejaVu Sans Mono', monospace !important; }"


def add_parser(subparsers) -> argparse.ArgumentParser:
    parser = subparsers.add_parser("demo", help="try trained models in a browser, on this machine alone")
    parser.add_argument("runs", nargs="*", default=["runs"], help="runs, checkpoints, or folders of them (runs)")
    parser.add_argument("--port", type=int, default=7860, help="on 127.0.0.1 (7860)")
    parser.add_argument("--no-browser", action="store_true", help="print the address and open nothing")
    return parser


def run(args) -> None:
    if not 1 <= args.port <= 65535:
        raise ValueError(f"--port is {args.port}; ports are 1 to 65535")
    found = by_kind(args.runs)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
    try:
        import gradio as gr
    except ImportError:
        raise ValueError("the demo needs gradio: pip install -e '.[demo]' in the checkout") from None
    page = build(gr, found)
    try:
        page.queue(max_size=16, default_concurrency_limit=1).launch(
            server_name="127.0.0.1",
            server_port=args.port,
            share=False,
            inbrowser=not args.no_browser,
            max_file_size=UPLOAD,
            theme=gr.themes.Base(primary_hue="teal", font=["system-ui", "sans-serif"], font_mono=["monospace"]),
            footer_links=[],
            css=CSS,
            quiet=True,
            prevent_thread_lock=True,
        )
    except OSError as error:
        raise ValueError(f"--port {args.port} cannot be used: {error}") from None
    print(f"Running on http://127.0.0.1:{args.port} for this machine alone; Ctrl-C stops it", flush=True)
    page.block_thread()


def build(gr, found: dict[str, dict[str, Path]]):
    """The page: a tab for every kind in `found`, {kind: {name: folder}}."""
    from importlib import import_module

    with gr.Blocks(title="ssmzoo", analytics_enabled=False) as page:
        gr.Markdown("# ssmzoo")
        for name in TABS:
            module = import_module(f"ssmzoo.cli.demo_tabs.{name}")
            if runs := found.get(module.KIND):
                module.tab(gr, runs)
    return page


def by_kind(given: list[str]) -> dict[str, dict[str, Path]]:
    """{kind: {name: run folder or checkpoint}}. ValueError where there is nothing that a tab could show."""
    found: dict[str, dict[str, Path]] = {}
    for folder in (Path(g) for g in given):
        if not folder.is_dir():
            raise ValueError(f"no run, checkpoint or folder of them at {folder}")
        for path, manifest in checkpoints(folder):
            if kind := kind_of(manifest):
                short = "/".join(path.parts[-2:])
                name = short if short not in found.get(kind, {}) else path.as_posix()
                found.setdefault(kind, {})[name] = path
    if not found:
        raise ValueError(
            f"nothing to show in {', '.join(given)}: train a model first (text, digits, photographs, data=formal), or "
            f"give notebooks/checkpoints"
        )
    return found


def checkpoints(folder: Path) -> Iterator[tuple[Path, dict]]:
    """(run folder or checkpoint, its manifest) of everything at or below a folder."""
    from ssmzoo.checkpoint_files import INDEX, MANIFEST, read_json

    for index in sorted(folder.rglob(INDEX)):
        manifests = sorted(index.parent.glob(f"*/{MANIFEST}"))
        if manifests:
            yield index.parent.parent, read_json(manifests[-1])
    for manifest in sorted(folder.rglob(MANIFEST)):
        if not (manifest.parent.parent / INDEX).exists():
            yield manifest.parent, read_json(manifest)


def kind_of(manifest: dict) -> str | None:
    """What a run was trained for, where a tab can show it."""
    config = manifest.get("config") or {}
    task, model = (str((config.get(k) or {}).get("_target_", "")).rpartition(".")[2] for k in ("task", "model"))
    if task == "FormalLanguage":
        return "automaton" if model == "SDSSMModel" else None
    return KINDS.get(task)
