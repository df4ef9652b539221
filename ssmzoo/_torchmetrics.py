"""Lightning needs one class of torchmetrics; `import torchmetrics` loads all of it, and with it transformers,
torchvision, scipy.signal and matplotlib where they are installed: several seconds before the first step.

`import_lightly()` puts a package in place that finds its submodules as ever, gives `Metric` and `MetricCollection` at
once, and becomes the whole of torchmetrics when anything else is asked of it; so does its module for plots.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import logging
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any


class _Light(types.ModuleType):
    """A module that has some names and executes its file when another one is asked for."""

    def __init__(self, name: str, spec, given: dict[str, Callable[[], Any]]):
        super().__init__(name)
        self.__spec__, self.__file__, self._given = spec, spec.origin, given
        if spec.submodule_search_locations is not None:
            self.__path__ = spec.submodule_search_locations
        sys.modules[name] = self

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        if name in self._given:
            return self._given[name]()
        return getattr(self.whole(), name)

    def whole(self) -> types.ModuleType:
        if isinstance(self, _Light):
            self.__class__ = types.ModuleType
            self.__spec__.loader.exec_module(self)
        return self


def _metric():
    importlib.import_module("torchmetrics.utilities")  # the order in which they can import each other
    return importlib.import_module("torchmetrics.metric").Metric


def import_lightly() -> None:
    """To be called before Lightning is imported; does nothing where torchmetrics is imported already."""
    spec = importlib.util.find_spec("torchmetrics")
    if "torchmetrics" in sys.modules or spec is None:
        return
    package = _Light(
        "torchmetrics",
        spec,
        {
            "Metric": _metric,
            "MetricCollection": lambda: importlib.import_module("torchmetrics.collections").MetricCollection,
            "utilities": lambda: importlib.import_module("torchmetrics.utilities"),
        },
    )
    package._logger = logging.getLogger("torchmetrics")  # its modules print by it
    package.__version__ = importlib.metadata.version("torchmetrics")
    name, file = "torchmetrics.utilities.plot", Path(spec.origin).parent / "utilities" / "plot.py"
    if file.exists():

        def draw(*args, **kwargs):
            return _Light.whole(plots).plot_single_or_multi_val(*args, **kwargs)

        plots = _Light(
            name,
            importlib.util.spec_from_file_location(name, file),
            {"plot_single_or_multi_val": lambda: draw, "_AX_TYPE": lambda: Any, "_PLOT_OUT_TYPE": lambda: Any},
        )
