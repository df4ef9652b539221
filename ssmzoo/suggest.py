"""The names nearest to a misspelt one, for error messages."""

from __future__ import annotations

import difflib


def nearest(name: str, choices) -> str:
    """'; nearest: a, b' for an error message; empty when nothing is close."""
    close = difflib.get_close_matches(name, list(choices), n=3, cutoff=0.4)
    return f"; nearest: {', '.join(close)}" if close else ""
