"""Which layer gets how many bits: modes, mixtures of modes, and the settings of a quantisation.

    mode     weights   activations that meet a weight     between the layers of a mixer
    w8a8     8 bits    8 bits, scales from calibration    8 bits: projections, convolution, what the scan reads
    w4a8     4 bits    8 bits, scales from calibration    8 bits
    w4a16    4 bits    as computed (16 or 32 bits)        as computed
    w8a16    8 bits    as computed                        as computed

The time step's projection (dt_proj) has 8 bits in every mode; experts' activations are scaled token by token.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ssmzoo.adapt.quantise.observers import ALPHA
from ssmzoo.suggest import nearest

MODES = {"w8a8": (8, True), "w4a8": (4, True), "w4a16": (4, False), "w8a16": (8, False)}
METHODS = ("gptq", "nearest")


@dataclass(frozen=True)
class Settings:
    """How a model is quantised.

    mode          one of MODES; layers: {glob of module names: mode} for the layers that differ, the last match counts
    method        of 4-bit weights: gptq, or nearest (rounding to nearest)
    rotate        fuse the norms and rotate (Hadamard); reorder: sort and cluster Mamba-2's channels where activations
                  have 8 bits; smooth: None, or the exponent of SmoothQuant-like scaling, usually 0.5 (without rotate)
    untie         a head that shares the embedding's table gets its own
    embedding, head   quantise them
    group_size    inputs that share a scale at 4 bits; damping: of GPTQ
    half          GPTQ corrects for 4-bit values that are rounded to fp16, as the released code computes
    percentile    of |x| that the scale of the scan's input is to represent where channels are not reordered

    Raises ValueError for values that have no meaning.
    """

    mode: str = "w4a16"
    layers: Mapping[str, str] = field(default_factory=dict)
    method: str = "gptq"
    rotate: bool = True
    reorder: bool = True
    smooth: float | None = None
    untie: bool = False
    embedding: bool = True
    head: bool = True
    group_size: int = 128
    damping: float = 0.01
    percentile: float = ALPHA
    half: bool = False

    def __post_init__(self):
        for mode in (self.mode, *self.layers.values()):
            if mode not in MODES:
                raise ValueError(f"unknown mode {mode!r}{nearest(str(mode), MODES)}; choose one of {', '.join(MODES)}")
        if self.method not in METHODS:
            raise ValueError(f"unknown method {self.method!r}; choose one of {', '.join(METHODS)}")
        if not isinstance(self.group_size, int) or self.group_size < 2:
            raise ValueError(f"group_size = {self.group_size}; it must be a number of inputs from 2, usually 128")
        if not self.damping > 0:
            raise ValueError(f"damping = {self.damping}; it must be positive, usually 0.01")
        if not 0 < self.percentile <= 1:
            raise ValueError(f"percentile = {self.percentile}; it must lie in (0, 1], usually 0.9995")
        if self.smooth is not None and (self.rotate or not 0 < self.smooth < 1):
            raise ValueError(
                f"smooth = {self.smooth} is an exponent in (0, 1), and goes without rotation: norms keep their weights"
            )

    def mode_of(self, name: str) -> str:
        """The mode of a module by its name."""
        found = [mode for glob, mode in self.layers.items() if fnmatch.fnmatch(name, glob)]
        return found[-1] if found else self.mode

    def bits(self, name: str) -> int:
        return MODES[self.mode_of(name)][0]

    def integer_activations(self, name: str) -> bool:
        return MODES[self.mode_of(name)][1]

    def check_layers(self, names: list[str]) -> None:
        """Every glob of `layers` must fit some module."""
        for glob in self.layers:
            if not fnmatch.filter(names, glob):
                raise ValueError(f"layers: no linear layer is called {glob!r}{nearest(glob, names)}")

    def plain(self) -> dict[str, Any]:
        return asdict(self) | {"layers": dict(self.layers)}
