"""Quantisation after training: a language model of small integers, from a float one and a little text.

    fuse_norms, rotate, reorder, smooth, separate_experts    float model -> float model, the same function
    quantise                                                 float model -> a model of integers (all steps, in order)
    structure, restructure                                   its form as plain JSON, and back

Quamba (Mamba, arXiv 2410.13229) and Quamba2 (Mamba-2, 2503.22879), for mixtures of experts and hybrids as well; other
models by their linear layers alone. docs/quantisation.md says how to use it and what it costs.
Letters: e outputs, d inputs, m groups of inputs, h heads of p channels, g SSD groups.
"""

from ssmzoo.adapt.quantise.norms import fuse_norms, untie
from ssmzoo.adapt.quantise.pipeline import quantise
from ssmzoo.adapt.quantise.plan import METHODS, MODES, Settings
from ssmzoo.adapt.quantise.reorder import reorder
from ssmzoo.adapt.quantise.rotation import rotate
from ssmzoo.adapt.quantise.smooth import smooth
from ssmzoo.adapt.quantise.stored import FORMAT, restructure, structure
from ssmzoo.adapt.quantise.structure import separate_experts

__all__ = [
    "FORMAT",
    "METHODS",
    "MODES",
    "Settings",
    "fuse_norms",
    "quantise",
    "reorder",
    "restructure",
    "rotate",
    "separate_experts",
    "smooth",
    "structure",
    "untie",
]
