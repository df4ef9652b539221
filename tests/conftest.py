import pytest
import torch

from ssmzoo._torchvision import make_importable

make_importable()  # in the controlling process of pytest-xdist too, which imports the classes of warnings it is sent


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
