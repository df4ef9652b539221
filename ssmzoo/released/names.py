"""Names of tensors in two repositories, as pairs of templates that are read in both directions."""

from __future__ import annotations

import re

from torch import Tensor

PLACEHOLDER = re.compile(r"\{(\w+)\}")
ANY = {"at": r"(?:.+\.)?", "rest": r".+"}  # where in a model, with its dot or empty; the rest of a name; else one part


class Names:
    """Pairs (theirs, ours) such as ("classifier.head.{p}", "head.{p}"); a name that fits no pair is the same in both.

    {at} stands for the beginning of a name up to a dot, or for nothing, {rest} for any end, {anything else} for one
    part between dots. The first pair that fits the whole name counts.
    """

    def __init__(self, *pairs: tuple[str, str]):
        self.inward = [(_pattern(theirs), ours) for theirs, ours in pairs]
        self.outward = [(_pattern(ours), theirs) for theirs, ours in pairs]

    def to_ours(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {_rename(key, self.inward): value for key, value in state.items()}

    def to_theirs(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {_rename(key, self.outward): value for key, value in state.items()}


def _pattern(template: str) -> re.Pattern:
    parts = PLACEHOLDER.split(template)  # text, name, text, name, ...
    return re.compile(
        "".join(f"(?P<{part}>{ANY.get(part, '[^.]+')})" if i % 2 else re.escape(part) for i, part in enumerate(parts))
    )


def _rename(key: str, rules: list[tuple[re.Pattern, str]]) -> str:
    for pattern, template in rules:
        if match := pattern.fullmatch(key):
            return template.format(**match.groupdict())
    return key


def add_prefix(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in state.items()}


def cut_prefix(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names without `prefix`, where they have it."""
    return {key.removeprefix(prefix): value for key, value in state.items()}
