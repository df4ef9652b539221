"""The README.md of an export: where the model comes from, what it was measured at, how it is read."""

from __future__ import annotations

import json

from ssmzoo.inference.export.source import Source


def model_card(source: Source, to: str, usage: str, command: str | None = None) -> str:
    """Markdown with the front matter that model hubs read."""
    manifest, tags = source.manifest, ["ssmzoo", "state-space-model", to]
    total = sum(p.numel() for p in source.model.parameters())
    rows = [
        ("class", type(source.model).__name__ if source.cls is None else source.cls.__name__),
        ("parameters", f"{total:,}"),
        ("exported from", f"`{source.origin}`"),
        ("with", f"`{command}`" if command else "`ssmzoo.inference.export.export`"),
        ("steps of training", manifest.get("step")),
        ("data", _plain(manifest.get("data"))),
        ("metrics", ", ".join(f"{k} {v:.4g}" for k, v in manifest.get("metrics", {}).items())),
        ("git commit", manifest.get("git_commit")),
        ("versions", ", ".join(f"{k} {v}" for k, v in manifest.get("versions", {}).items())),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows if value not in (None, "", {}))
    parts = [
        "---\n" + "".join(f"{k}: {v}\n" for k, v in _front(source).items()),
        "tags:\n" + "".join(f"- {tag}\n" for tag in tags) + "---\n\n",
        f"# {source.name}, in the layout {to}\n\n| | |\n|---|---|\n{table}\n\n",
        f"## Reading it\n\n{usage.strip()}\n",
    ]
    if source.node:
        parts.append(f"\n## Architecture\n\n```json\n{json.dumps(source.node, indent=1)}\n```\n")
    return "".join(parts)


def _front(source: Source) -> dict[str, str]:
    pipelines = {"language": "text-generation", "image": "image-classification", "restoration": "image-to-image"}
    return {"pipeline_tag": pipelines[source.kind]} if source.kind in pipelines else {}


def _plain(data: dict | None) -> str:
    return ", ".join(f"{key} {value}" for key, value in (data or {}).items())
