"""How many things the tests of a run tried: counted where they are tried, printed when the run ends (not under -n)."""

from collections import Counter

COUNTS: Counter[str] = Counter()


def tried(what: str, count: int = 1) -> None:
    COUNTS[what] += count
