"""What is said where Triton or a tensor is not what GPU kernels need; no kernel runs here."""

import re
import sys

import pytest
from toy_operators import EXAMPLES

from ssmzoo import ops
from ssmzoo.ops import triton as ours

SERVED = [
    name
    for name in EXAMPLES
    if "triton" in ops.OPERATORS[name.partition(":")[0]].backends
    and name != "stack_step"  # the weights of a whole model, which are not looked at for every token
]


@pytest.mark.parametrize(
    "source, message",
    [
        ("__version__ = '3.1.0'", "triton 3.1.0 is too old, expected 3.2 or newer"),
        (
            "raise RuntimeError('libcuda is broken')",
            "installed but cannot be imported .RuntimeError: libcuda is broken",
        ),
        ("__version__ = '3.2.0'", None),
    ],
)
def test_an_old_or_broken_triton_is_named(monkeypatch, tmp_path, source, message):
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text(source)
    (tmp_path / "triton" / "language.py").write_text("")
    for name in [name for name in sys.modules if name.partition(".")[0] == "triton"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(ours, "INTERPRETED", True)  # else Triton is not even looked at without a GPU
    try:
        found = ours._why_missing()
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "triton"]:
            del sys.modules[name]
    assert found is None if message is None else re.search(message, found)


@pytest.mark.parametrize("name", SERVED)
def test_tensors_on_two_devices_are_named(name):
    call, make = EXAMPLES[name]()
    tensors = make()
    last = list(tensors)[-1]
    with pytest.raises(ValueError, match="meta"):
        call(**tensors | {last: tensors[last].to("meta")})
