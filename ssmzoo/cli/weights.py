"""`ssmzoo weights list|show|fetch|where`: the weights that authors released, by name."""

from __future__ import annotations

import argparse
import fnmatch
from pathlib import Path


def add_parser(subparsers) -> argparse.ArgumentParser:
    parser = subparsers.add_parser("weights", help="released weights: list, show, fetch them; where they are kept")
    actions = parser.add_subparsers(dest="action", required=True, metavar="list|show|fetch|where")
    names = actions.add_parser("list", help="every released file that is known")
    names.add_argument("pattern", nargs="?", default="*", help="glob of names, e.g. 'vmamba*'")
    show = actions.add_parser("show", help="source, licence, metric and arguments of a file")
    show.add_argument("name")
    fetch = actions.add_parser("fetch", help="download a file, or take in one that you downloaded")
    fetch.add_argument("name")
    fetch.add_argument("--file", type=Path, help="a copy on this machine, for sources that only a browser can reach")
    actions.add_parser("where", help="folders that downloads are kept in")
    return parser


def run(args) -> None:
    {"list": list_names, "show": show, "fetch": fetch, "where": where}[args.action](args)


def entry_of(name: str):
    from ssmzoo.presets import read_model_config
    from ssmzoo.released.catalogue import entries_of, find_weights, split_name

    preset, tag = split_name(name)
    if not entries_of(preset):
        read_model_config(preset)  # a misspelt name is refused with the nearest name
    return find_weights(preset, tag)


def list_names(args) -> None:
    from ssmzoo.released.catalogue import ByHand, catalogue
    from ssmzoo.released.download import note_of, read_record
    from ssmzoo.suggest import nearest

    known = catalogue()
    found = [known[name] for name in sorted(fnmatch.filter(known, args.pattern))]
    if not found:
        raise ValueError(f"no released file fits {args.pattern!r}{nearest(args.pattern, known)}")
    print(f"{'name':<28}{'licence':<31}{'size':>10}  {'here':<6}{'fetched by':<12}published")
    for entry in found:
        size = f"{entry.bytes / 2**20:,.0f} MiB" if entry.bytes else "?"
        record = read_record(note_of(entry), entry)
        here = "yes" if record and Path(record["path"]).exists() else "no"
        by = "hand" if isinstance(entry.source, ByHand) else "program"
        print(f"{entry.name:<28}{entry.licence or 'none stated':<31}{size:>10}  {here:<6}{by:<12}{entry.metric}")


def show(args) -> None:
    from ssmzoo.released.download import note_of, read_record

    entry = entry_of(args.name)
    record = read_record(note_of(entry), entry)
    digest = entry.sha256 or (f"{record['sha256']} (recorded at the first download)" if record else None)
    arguments = ", ".join(f"{key}={value}" for key, value in {**entry.arguments, **entry.model}.items())
    rows = {
        "model": entry.preset,
        "family": entry.family,
        "source": entry.source,
        "how": getattr(entry.source, "todo", None),
        "licence": entry.licence or "none stated by the publisher",
        "bytes": f"{entry.bytes:,}" if entry.bytes else "not published",
        "sha256": digest or "not published; recorded at the first download",
        "taken from": f"the first of {', '.join(entry.wrappers)} that the file has",
        "arguments": arguments or "inferred from the tensors",
        "pictures": entry.picture and str(entry.picture).removeprefix("Picture"),
        "tokenizer": entry.tokenizer,
        "published": entry.metric,
        "note": entry.note,
        "on this machine": record.get("path", "no"),
        "use": f"ssmzoo.create_model({entry.name!r}, pretrained=True)",
    }
    print(entry.name)
    for key, value in rows.items():
        if value:
            print(f"  {key:<16} {value}")


def fetch(args) -> None:
    from ssmzoo.released.download import fetch

    print(fetch(entry_of(args.name), args.file))


def where(args) -> None:
    from ssmzoo.released.download import endpoint, hub_cache, offline, weights_folder

    print(f"pickles, as safetensors, and records   {weights_folder()}   (TORCH_HOME)")
    print(f"the hub's files                        {hub_cache()}   (HF_HOME, HF_HUB_CACHE)")
    print(f"the hub                                {endpoint()}   (HF_ENDPOINT){', offline' if offline() else ''}")
