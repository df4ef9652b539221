"""Let torchvision be imported beside a CPU-only torch.

The torchvision wheels of the package index are CUDA builds. Beside a CPU torch their compiled part cannot load, two
operators stay undeclared and `import torchvision` fails, and with it timm, torchmetrics and Lightning, which import it
when it is installed. Declaring the two operators first is enough for everything that does not call them.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys

_library = None  # keeps the declarations alive


def make_importable() -> None:
    """Import torchvision if it is installed; where its operators are missing, declare them and import it again."""
    global _library
    if "torchvision" in sys.modules or importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms does not exist" not in str(error):
            raise
        import torch

        for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        _library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            _library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        importlib.import_module("torchvision")


class _Cured(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Steps in at the first `import torchvision`, imports it by `make_importable` and hands over the result."""

    def find_spec(self, name, path=None, target=None):
        if name != "torchvision":
            return None
        sys.meta_path.remove(self)
        make_importable()
        return importlib.util.spec_from_loader(name, self) if name in sys.modules else None

    def create_module(self, spec):
        self.module = sys.modules[spec.name]
        self.spec = self.module.__spec__
        return self.module

    def exec_module(self, module) -> None:
        module.__spec__ = self.spec


def cure_on_import() -> None:
    """`make_importable` when torchvision is first imported, which takes seconds and most runs never do."""
    if "torchvision" not in sys.modules and not any(isinstance(f, _Cured) for f in sys.meta_path):
        sys.meta_path.insert(0, _Cured())
