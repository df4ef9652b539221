"""Constructors of official classes as tables: every argument, its default there, and what becomes of it here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ssmzoo.suggest import nearest

DEVICE = {  # where and how the official module is made
    "device": (None, "where the official module is created"),
    "dtype": (None, "in which type the official module is created; a file brings its own"),
}
RECOMPUTE = (False, "recomputes activations in training; the results are the same")
KERNEL = "chooses a kernel; the results are the same"
INITIAL = "sets an initial value, which the checkpoint replaces"


class Arguments:
    """The arguments of one official class.

    honoured   {name: the class's own default}
    inert      {name: (default, why it has no influence on what a loaded model computes)}
    refused    {name: (default, why no other value is taken)}
    required   names without a default there
    """

    def __init__(
        self,
        cls: str,
        honoured: Mapping[str, Any],
        inert: Mapping[str, tuple[Any, str]] = {},
        refused: Mapping[str, tuple[Any, str]] = {},
        required: tuple[str, ...] = (),
    ):
        self.cls, self.honoured, self.inert, self.refused, self.required = cls, honoured, inert, refused, required

    @property
    def names(self) -> list[str]:
        return [*self.required, *self.honoured, *self.inert, *self.refused]

    def default(self, name: str) -> Any:
        """What the official class takes when `name` is left out."""
        return self.honoured[name] if name in self.honoured else (self.inert | self.refused)[name][0]

    def complete(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The honoured arguments, with the official defaults for those that are not given.

        Raises TypeError for an unknown argument or one that is missing, ValueError for one that is refused.
        """
        for name, value in given.items():
            if name not in self.names:
                raise TypeError(f"{self.cls} takes no argument {name!r}{nearest(name, self.names)}")
            if name in self.refused and not _same(value, self.refused[name][0]):
                raise ValueError(f"{self.cls}: {name}={value!r}: {self.refused[name][1]}")
        missing = [name for name in self.required if name not in given]
        if missing:
            raise TypeError(
                f"{self.cls}: {', '.join(missing)} cannot be inferred from the tensors and must be given by name"
            )
        return {name: given.get(name, value) for name, value in self.honoured.items()} | {
            name: given[name] for name in self.required
        }


def _same(a: Any, b: Any) -> bool:
    return a == b or (isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and list(a) == list(b))
