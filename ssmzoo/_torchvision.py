"""Let torchvision be imported beside a CPU-only torch.

The torchvision wheels of the package index are CUDA builds. Beside a CPU torch their compiled part cannot load, two
operators stay undeclared and `import torchvision` fails, and with it timm, torchmetrics and Lightning, which import it
when it is installed. Declaring the two operators first is enough for everything that does not call them.
"""

from __future__ import annotations

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
