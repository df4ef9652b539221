"""A page per file of ssmzoo/models: header, figure of the block, sizes, released weights, parity, results."""

from __future__ import annotations

import ast
import functools
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from block_figure import figure
from docstrings import escape, parts_of_header

from ssmzoo.presets import build_model, describe_config, list_models, model_class, read_model_config

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden"
SIDE = 224  # of the pictures whose operations are counted


def model_files() -> list[Path]:
    """Files of ssmzoo/models that hold a model with a config."""
    return [f for f in sorted((ROOT / "ssmzoo" / "models").glob("*.py")) if f.stem in presets()]


@functools.cache
def presets() -> dict[str, list[str]]:
    """{model file: its names}, the shortest (the laptop size) first."""
    found: dict[str, list[str]] = {}
    for name in list_models():
        module = model_class(read_model_config(name)["model"]["_target_"]).__module__
        found.setdefault(module.rpartition(".")[2], []).append(name)
    return {file: sorted(names, key=lambda n: (len(n), n)) for file, names in found.items()}


def page(file: Path) -> str:
    """The page of a model file as Markdown."""
    header = parts_of_header(ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "")
    names = presets()[file.stem]
    home = read_model_config(names[0])
    parts = [
        f"# {header['name'] or title(file.stem)}",
        header["claim"][:1].upper() + header["claim"][1:],
        f"```bash\npython train.py model={names[0]}    # task={home.get('task')}, data={home.get('data')}\n```",
        header["body"],
        *block(names[0]),
        "## Sizes",
        sizes(names),
        *released(names),
        *parity(file.stem),
        *results(names, header["name"]),
    ]
    if header["differs"]:
        parts += ["## How it differs", header["differs"]]
    parts += ["## Source", f"`{file.relative_to(ROOT)}`. {header['source']}"]
    return "\n\n".join(p for p in parts if p) + "\n"


def title(stem: str) -> str:
    return stem.replace("_", " ").capitalize()


def arguments(name: str) -> dict:
    """What a preset gives the constructor, without what only data know."""
    node = read_model_config(name)["model"]
    return {k: v for k, v in node.items() if not (isinstance(v, str) and "${" in v)}


def build(name: str, device: str):
    """The preset's model; sizes that data decide are the constructor's defaults, or small where these refuse."""
    with torch.device(device):
        try:
            return build_model(arguments(name))
        except ValueError:
            return build_model(arguments(name) | {"num_classes": 10})


def inputs_of(name: str, model) -> tuple | None:
    """A small input of the kind that the model's task gives."""
    task = read_model_config(name).get("task", "")
    if task in ("language", "recall", "formal", "birdie", "prefix_language", "questions"):
        return (torch.zeros(1, 16, dtype=torch.long),)
    if task in ("classification", "restoration", "fscil", "denoise", "jpeg"):
        given = inspect.signature(type(model)).parameters
        read = {k: p.default for k, p in given.items()} | arguments(name)
        channels = next((read[k] for k in ("in_chans", "inp_channels") if isinstance(read.get(k), int)), 3)
        side = read["img_size"] if isinstance(read.get("img_size"), int) else 64
        return (torch.zeros(1, channels, side, side),)
    if task == "graphs":
        edges = torch.tensor([[0, 1, 2, 3], [1, 2, 3, 0]])
        return ({"x": torch.zeros(4, 3), "edge_index": edges, "edge_attr": torch.zeros(4, 1)},)
    if task == "motion_codes":
        from ssmzoo.models.motion_vqvae import CHANNELS

        return ({part: torch.zeros(1, 8, channels) for part, channels in CHANNELS.items()},)
    if task == "speech_motion":
        ids = torch.zeros(1, 8, dtype=torch.long)
        return (torch.zeros(1, 8 * 533, 3), ids, torch.zeros(1, 8, 337), torch.ones(1, 8, 337), ids)
    if task == "anomaly":
        return (torch.zeros(1, 20, model.enc_in),)
    return None


def block(name: str) -> Iterator[str]:
    torch.manual_seed(0)
    model = build(name, "cpu")
    svg, caption = figure(model, inputs_of(name, model))
    yield "## The block"
    yield svg
    yield caption + "."


def sizes(names: list[str]) -> str:
    """Parameters of every preset, operations of the classifiers."""
    from ssmzoo.layers.feedforward.moe import active_parameters

    rows = []
    built = {name: build(name, "meta") for name in names}
    for name, model in sorted(built.items(), key=lambda m: sum(p.numel() for p in m[1].parameters())):
        total, active = sum(p.numel() for p in model.parameters()), active_parameters(model)
        shown = f"{total:,}" + (f" ({active:,} active)" if active != total else "")
        rows.append((f"`{name}`", shown, operations(name, model), escape(describe_config("model", name))))
    counted = any(r[2] for r in rows)
    head = ["name", "parameters", *(["operations, 10^9"] if counted else []), "what"]
    rows = [r if counted else (r[0], r[1], r[3]) for r in rows]
    notes = []
    if counted:
        notes.append(
            f"Operations are multiply-adds of one picture of {SIDE} x {SIDE} pixels (or of the size in the name), "
            "counted by `ssmzoo.probes.flops`."
        )
    if any("vocab_size" in str(v) for v in read_model_config(names[0])["model"].values() if isinstance(v, str)):
        notes.append("Where the data decide about the vocabulary, the constructor's default is counted.")
    return "\n\n".join([table(head, rows), *([" ".join(notes)] if notes else [])])


def operations(name: str, model) -> str:
    """10^9 multiply-adds of a published classifier; empty for others."""
    from ssmzoo.probes.flops import count_operations, giga

    if read_model_config(name).get("task") != "classification" or sum(p.numel() for p in model.parameters()) < 5e6:
        return ""
    side = next((int(s) for s in re.findall(r"_(\d{3})$", name)), SIDE)
    try:
        return f"{giga(count_operations(model, 1, 3, side, side)):.2f}"
    except (RuntimeError, ValueError):
        return ""


def released(names: list[str]) -> Iterator[str]:
    from ssmzoo.released.catalogue import entries_of

    entries = sorted((e for name in names for e in entries_of(name)), key=lambda e: (e.bytes is None, e.bytes or 0))
    if not entries:
        return
    yield "## Released weights"
    head = ["name", "where", "MB", "licence", "published"]
    rows = []
    for e in entries:
        size = f"{e.bytes / 1e6:,.0f}" if e.bytes else ""
        rows.append((f"`{e.name}`", where(e.source), size, e.licence or "none stated", escape(e.metric)))
    yield table(head, rows)
    yield f'```python\nmodel = ssmzoo.create_model("{entries[0].name}", pretrained=True)\n```'


def where(source) -> str:
    """A link, or the repository's name on the hub."""
    if hasattr(source, "repo"):
        return escape(source.repo)
    link = source.url if hasattr(source, "url") else source.link
    host = link.split("/")[2].removeprefix("www.")
    return f"[{host}]({link})" + ("" if hasattr(source, "url") else ", by hand")


def families_of(stem: str) -> list[str]:
    """Families of golden cases whose file in released/ builds a model of this file."""
    found = []
    for file in sorted((ROOT / "ssmzoo" / "released").glob("*.py")):
        imported = {
            node.module
            for node in ast.walk(ast.parse(file.read_text()))
            if isinstance(node, ast.ImportFrom) and node.module
        }
        if f"ssmzoo.models.{stem}" in imported and (GOLDEN / file.stem).is_dir():
            found.append(file.stem)
    return found


def parity(stem: str) -> Iterator[str]:
    """Every stored case of the official code, checked while the page is made."""
    from ssmzoo.cli.verify import check

    families = families_of(stem)
    if not families:
        return
    files = [f for family in families for f in sorted((GOLDEN / family).glob("*.json"))]
    rows = [(f.parent.name, f.stem, *check(f, 1e-4)) for f in files]
    yield "## Parity"
    yield (
        f"Relative errors against {len(rows)} stored cases of the official code, computed when this page was made; "
        f"`ssmzoo verify tests/golden --family {','.join(families)}` prints them."
    )
    yield table(["family", "case", "outputs", "gradients", "result"], rows)


def results(names: list[str], title: str) -> Iterator[str]:
    """Rows of the benchmark pages that name this system in their first cell."""
    wanted = {re.sub(r"\W", "", n).lower() for n in [*names, title] if n}
    pages = [ROOT / "docs" / "performance.md", *sorted((ROOT / "docs" / "results").glob("*.md"))]
    found = [(p, t) for p in pages for t in tables(p.read_text(encoding="utf-8"), wanted)]
    if not found:
        return
    yield "## Measured"
    last = None
    for file, text in found:
        if file != last:
            yield f"From [{heading(file)}](../{file.relative_to(ROOT / 'docs').as_posix()}):"
        last = file
        yield text


def heading(file: Path) -> str:
    return file.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")


def tables(text: str, wanted: set[str]) -> Iterator[str]:
    """Tables of a page, cut down to the rows about one of the wanted names."""
    for found in re.findall(r"(?:^\|.*\n)+", text, re.M):
        head, rule, *rows = found.splitlines()
        kept = [r for r in rows if names_in(r) & wanted]
        if kept and re.match(r"\|[\s:|-]+\|$", rule):
            yield "\n".join([head, rule, *kept])


def names_in(row: str) -> set[str]:
    """Possible names in a row's first cell: the whole of it, and what stands after model= or in code."""
    first = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", row.strip("|").split("|")[0])
    words = [first, first.partition("(")[0], *re.findall(r"model=(\w+)", first), *re.findall(r"`([^`]+)`", first)]
    return {re.sub(r"\W", "", w).lower() for w in words}


def table(head, rows) -> str:
    lines = [f"| {' | '.join(map(str, cells))} |" for cells in [head, ["---"] * len(head), *rows]]
    return "\n".join(lines)


def index() -> str:
    """The list of all pages."""
    rows = []
    for file in model_files():
        header = parts_of_header(ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "")
        home = read_model_config(presets()[file.stem][0])
        claim = header["claim"][:1].upper() + header["claim"][1:]
        rows.append(
            (
                f"[{header['name'] or title(file.stem)}]({file.stem}.md)",
                home.get("task"),
                len(presets()[file.stem]),
                claim,
            )
        )
    text = "# Models\n\nA page per system, made from its file, its configs and its stored cases when the site is built."
    return f"{text}\n\n{table(['system', 'task', 'sizes', 'what is new'], rows)}\n"
