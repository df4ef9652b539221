"""Exported restoration models load in spandrel, which finds out what they are, and restore as they do here."""

import exports
import pytest
import torch

from ssmzoo._torchvision import make_importable

make_importable()
spandrel = pytest.importorskip("spandrel", reason="spandrel is not installed (pip install spandrel)")
import ssmzoo.spandrel  # noqa: E402
from ssmzoo.inference.export import export  # noqa: E402
from ssmzoo.inference.export.source import family_of_class  # noqa: E402

SOURCES = {name: node for name, node in exports.IMAGES.items() if "mambair" in node["_target_"]}
FLAT = {name: node for name, node in SOURCES.items() if "unet" not in node["_target_"]}


@pytest.mark.parametrize("name", FLAT)
def test_spandrel_loads_the_official_export(name, tmp_path):
    ssmzoo.spandrel.install()
    assert ssmzoo.spandrel.install() == ["MambaIR", "MambaIRv2"]
    overrides = {"bicubic_skip": False} if "bicubic_skip" in FLAT[name] else {}  # which a released model does not have
    source = exports.source(name, tmp_path / "run", **overrides)
    out = export(source, "official", tmp_path / "out")
    (file,) = out.glob("*.pth")
    model = spandrel.ModelLoader().load_from_file(file)
    family = family_of_class(source.cls)
    assert model.architecture.id == ssmzoo.spandrel.NAMES[family][0] and model.scale == source.model.upscale
    assert model.input_channels == source.model.in_chans
    x = torch.rand(1, model.input_channels, 12, 20)
    torch.testing.assert_close(model(x), exports.outputs(source.model, x).clamp(0, 1), rtol=1e-4, atol=1e-5)
