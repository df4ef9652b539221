"""Hidden attention: what every channel of a selective scan, and every head of attention, reads, and what that explains.

The matrices themselves are in attention_matrices.py.
"""

from __future__ import annotations

import torch

from ssmzoo.probes.attention_matrices import (
    attention,
    attention_row,
    attention_rows,
    class_row,
    dense_map,
    exactness,
    implicit_attention,
    scan_output,
)
from ssmzoo.probes.explain import token_map
from ssmzoo.probes.scan import DenseScan, Scan
from ssmzoo.probes.softmax_attention import Attention
from ssmzoo.probes.subject import Finding
from ssmzoo.probes.tap import tap

__all__ = [
    "attention",
    "attention_row",
    "attention_rows",
    "class_row",
    "dense_map",
    "exactness",
    "implicit_attention",
    "probe",
    "scan_output",
]


def probe(subject):
    """Matrices of some channels, token maps of every layer, how exactly they reproduce the scans, and explanations."""
    from ssmzoo.probes import hidden_attention_figures as show

    tapped = tap(subject.model, layers=subject.layers, rows=1, max_bytes=subject.max_bytes, attention=True)
    with torch.no_grad(), tapped as scans:
        subject.model(subject.inputs[:1])
    finding, maps, reads = Finding(), {}, []
    shown = [s for s in scans if isinstance(s, (Scan, Attention))]
    for number, scan in enumerate(scans):
        key = f"{number}: {scan.name}"
        if isinstance(scan, DenseScan):
            maps[key] = dense_map(scan)[0]
            continue
        some = scan.take(show.shown_channels(scan, subject.channels))
        if subject.positions is not None:
            reads.append((key, some, attention_rows(some, in_range(subject.positions, scan.length))[0]))
            continue
        maps[key] = token_map(scan, torch.abs, max(1, len(scan.channels) // 32), subject.max_bytes)[0]
        error = "|weights v - y| / |y|" if isinstance(scan, Attention) else "|alpha u + D u - scan| / |scan|"
        finding.summary[f"{key}, {error}"] = f"{exactness(some, subject.max_bytes):.1e}"
    if reads:
        show.rows_of_channels(finding, reads, subject)
    if maps:
        show.token_maps(finding, maps)
    if shown and subject.positions is None:
        finding.figures["channels"] = show.channels(shown, subject)
        show.explanations(finding, subject)
    return finding


def in_range(positions, length: int) -> list[int]:
    wrong = [p for p in positions if not -length <= p < length]
    if wrong:
        raise ValueError(f"positions {wrong} do not exist: the scan has {length} steps, numbered from 0")
    return [p % length for p in positions]
