"""What reaches the terminal: text, and no control codes, whichever file or name it came from."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator

# C0 but for tab, newline and return; delete; C1; and what reorders text (bidirectional overrides and isolates)
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")

COLOUR = re.compile(r"\\x1b(\[[\d;]*m)")  # as `printable` writes it


def printable(text: str) -> str:
    r"""Control characters as Python writes them: "\x1b[2J" instead of a cleared screen."""
    return CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def caption(text: object) -> str:
    """`printable` text for a figure, where dollars would stand around a formula: a broken one ends the drawing."""
    return printable(str(text)).replace("$", r"\$")


class Printable:
    """A text stream that writes `printable` text to another; `raw` is that other one.

    colours  let colour codes through, and no others, while a library prints lines of its own in colour
    """

    colours = False

    def __init__(self, raw):
        self.raw = raw

    def write(self, text: str) -> int:
        shown = printable(text)
        self.raw.write(COLOUR.sub("\x1b\\1", shown) if self.colours else shown)
        return len(text)

    def writelines(self, lines) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str):
        return getattr(self.raw, name)


def raw(stream):
    """The stream below `Printable`, for what moves the cursor on purpose (a progress bar)."""
    return stream.raw if isinstance(stream, Printable) else stream


@contextlib.contextmanager
def plain_output() -> Iterator[None]:
    """Standard output and error are `Printable` within the block."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (Printable(raw(stream)) for stream in before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
