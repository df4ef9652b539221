"""Write docs/released.md: what each family of released weights can do, found by looking.

python benchmarks/released_page.py          with the extra `export` installed, or the page says that onnx is not
"""

from __future__ import annotations

import functools
import sys
from collections import Counter
from pathlib import Path

import torch

from ssmzoo.inference.export import formats
from ssmzoo.inference.export.source import Source
from ssmzoo.released.catalogue import ByHand, catalogue
from ssmzoo.released.family import families, find, to_official
from ssmzoo.released.fit import fit_state_dict
from ssmzoo.released.golden import GoldenCase
from ssmzoo.released.load import build
from ssmzoo.released.maat import UNUSED

ROOT = Path(__file__).resolve().parent.parent
HEAD = """# Released weights

`ssmzoo weights list` names the files that are known, `ssmzoo weights show NAME` says where one comes from, under which
licence and what was measured with it, and `ssmzoo.create_model(NAME, pretrained=True)` fetches it. Files on Google
Drive have to be fetched with a browser; `ssmzoo weights fetch NAME --file PATH` takes them in. Downloads follow
HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE and TORCH_HOME (`ssmzoo weights where`); pickles are read without running anything
and kept as safetensors; the SHA-256 is compared with the published one, or with that of the first download.

The tests load no released file: they serve small files in each official layout from a local server
(`tests/released/test_download.py`) and compare every entry's arguments with its preset (`test_catalogue.py`).

Written by `python benchmarks/released_page.py`, which loads the stored cases of the official implementations, writes
them back under the official names, and asks each format of `ssmzoo ckpt export` whether it takes the family's models
(safetensors takes all of them; what was checked with which program: [export.md](export.md)).

| family | recognised by | arguments in tables | cases that load | come back bit for bit | exports | released files |
|---|---|---|---|---|---|---|
"""
LEFT_OUT = """Released, but not in the list:

- MambaIR's real-world super-resolution (a GAN, on Google Drive): no options file of its repository says how the network
  is built, and the MambaIR class there has no head for it. The file itself was not read.
- Quamba's quantised files: a layout of their own for CUDA kernels, under a licence for research.
- The Mamba and Transformer files of HazyResearch that Based is compared with: their sizes are not published.
"""


def round_trip(case: GoldenCase) -> tuple[bool, bool]:
    """(does the case load?, is it the same afterwards?)"""
    official = {key: value.detach() for key, value in case.params.items()}
    try:
        module, ours = build(case.family, official, case.official_kwargs)
        fit_state_dict(module, ours)
        back = to_official(case.family, module, **case.official_kwargs)
    except ValueError:
        return False, False
    back = {key: torch.view_as_real(v) if v.is_complex() else v for key, v in back.items()}
    called = {key: v for key, v in official.items() if case.family != "maat" or UNUSED not in key}
    return True, back.keys() == official.keys() and all(torch.equal(back[key], v) for key, v in called.items())


def row(family: str) -> str:
    files = sorted((ROOT / "tests" / "golden" / family).glob("*.json"))
    trips = [round_trip(case) for case in map(GoldenCase.load, files) if case.params]
    loaded, same = (sum(side) for side in zip(*trips)) if trips else (0, 0)
    marks = {"TELLING_KEYS": "its keys", "MODEL_TYPE": "config.json"}
    words = " or ".join(word for name, word in marks.items() if find(family, name))
    arguments = sum(len(table.names) for table in find(family, "TABLES") or ())
    entries = [entry for entry in catalogue().values() if entry.family == family]
    by_hand = sum(isinstance(entry.source, ByHand) for entry in entries)
    known = f"{len(entries)}{f' ({by_hand} by hand)' if by_hand else ''}" if entries else ""
    counts = (f"{loaded} of {len(trips)}", f"{same} of {len(trips)}") if trips else ("", "")
    found = set().union(*(layouts().get(cls.__name__, ()) for cls in find(family, "MODELS")))
    out = ", ".join(name for name in formats() if name in found)
    return f"| `{family}` | {words} | {arguments or ''} | {counts[0]} | {counts[1]} | {out} | {known} |"


@functools.cache
def layouts() -> dict[str, set[str]]:
    """{class of ours: the formats that take a small model of it}."""
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "inference")]
    import exports  # the tiny models of the tests

    found: dict[str, set[str]] = {}
    for name, node in exports.RUNS.items():
        source = Source(exports.build_model(node).eval(), {"model": name, "config": {"model": node}}, name)
        takes = {to for to, format in formats().items() if to != "safetensors" and not format.refuse(source)}
        found.setdefault(type(source.model).__name__, set()).update(takes)
    return found


def main() -> None:
    names = [family for family in families("MODELS") if (ROOT / "ssmzoo" / "released" / f"{family}.py").exists()]
    text = HEAD + "\n".join(map(row, names)) + "\n\n" + licences() + "\n" + LEFT_OUT
    (ROOT / "docs" / "released.md").write_text(text, encoding="utf-8")


def licences() -> str:
    count = Counter(entry.licence or "none stated by the publisher" for entry in catalogue().values())
    lines = [f"- {licence}: {n} files" for licence, n in count.most_common()]
    return "Licences of the weights:\n\n" + "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
