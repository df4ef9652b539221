"""`ssmzoo backends`: which implementation serves each operator here, and why not the faster ones."""

from __future__ import annotations

import argparse
import os


def add_parser(subparsers) -> argparse.ArgumentParser:
    return subparsers.add_parser("backends", help="which kernels run on this machine, and why not the others")


def run(args) -> None:
    from itertools import groupby

    from ssmzoo.ops import backend_table

    forced = os.environ.get("SSMZOO_BACKEND")
    print(f"{'operator':<26}{'backend':<11}{'':<8}reason")
    for _, rows in groupby(backend_table(), key=lambda row: row.operator):
        rows = list(rows)
        first = next((r.backend for r in rows if r.available), None) if forced is None else forced
        for i, row in enumerate(rows):
            mark = "chosen" if row.backend == first and row.available else "ready" if row.available else "-"
            print(f"{row.operator if i == 0 else '':<26}{row.backend:<11}{mark:<8}{row.reason}")
    print(
        "chosen: first in line here; a call whose device, dtype or shape it cannot serve goes to the next one"
        if forced is None
        else f"SSMZOO_BACKEND={forced} is set: no other backend is used"
    )
