"""The names nearest to a misspelt one, for error messages."""

from __future__ import annotations

import difflib


def nearest(name: str, choices) -> str:
    """'; nearest: a, b' for an error message; empty when nothing is close."""
    choices, name = [str(c) for c in choices], str(name)
    close = difflib.get_close_matches(name, choices, n=3, cutoff=0.6)
    if not close and len(name) > 2:  # a part of a longer name
        close = [c for c in choices if len(c) > 2 and (c.startswith(name) or name.startswith(c))][:3]
    return f"; nearest: {', '.join(close)}" if close else ""
