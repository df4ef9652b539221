"""ONNX programs give in onnxruntime what the model gives in torch, at other batches, sizes and many steps later."""

import re

import exports
import pytest
import torch

from ssmzoo.inference.export import export
from ssmzoo.inference.export.to_onnx import refuse
from ssmzoo.inference.export.traced import call_of, first_state, one_loop, sides, tensors_of
from ssmzoo.ops import selective_scan_fn

FAST = ("mamba (text)", "mambair_classic_x2")
RUNS = [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in exports.RUNS]


@pytest.mark.parametrize("name", RUNS)
def test_onnxruntime_computes_the_same(name, tmp_path, monkeypatch):
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (pip install '.[export]')")
    source = exports.source(name, tmp_path / "run")
    if reason := refuse(source):
        with pytest.raises(ValueError, match="has no layout 'onnx'"):
            export(source, "onnx", tmp_path / "out")
        assert len(reason) > 10
        return
    written = export(source, "onnx", tmp_path / "out")
    (code,) = re.findall(r"```python\n(.*?)```", (written / "README.md").read_text(encoding="utf-8"), re.S)
    monkeypatch.chdir(written)
    exec(code, {})  # what the card tells a reader to do
    session = onnxruntime.InferenceSession(written / "model.onnx")
    if source.kind == "language":
        return decode(source.model, session)
    _, channels, height, width = call_of(source).inputs[0].shape  # the size of its training, where it takes no other
    sizes = [(1, height, width), (5, height, width)] + ([(2, height + 4, width + 9)] if sides(source) else [])
    for b, h, w in sizes:
        x = torch.rand(b, channels, h, w)
        (got,) = session.run(None, {"pixels": x.numpy()})
        torch.testing.assert_close(torch.from_numpy(got), exports.outputs(source.model, x), rtol=1e-4, atol=1e-5)


def decode(model, session):
    """Three rows, token by token, from a state of zeros."""
    ids = torch.randint(29, (3, 9))
    state = [torch.zeros(3, *t.shape[1:], dtype=t.dtype) for t in tensors_of(first_state(model))]
    logits = []
    for token in ids.split(1, dim=1):
        fed = {"input_ids": token.numpy()} | {f"state_{i}": s.numpy() for i, s in enumerate(state)}
        now, *state = (torch.from_numpy(r) for r in session.run(None, fed))
        logits.append(now)
    torch.testing.assert_close(torch.cat(logits, dim=1), exports.outputs(model, ids), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("constant", [True, False])
def test_the_loop_is_the_scan(constant):
    b, e, l, n = 2, 4, 7, 3
    u, delta, z = torch.randn(b, e, l), torch.rand(b, e, l), torch.randn(b, e, l)
    A, B, C = -torch.rand(e, n), torch.randn(*((e, n) if constant else (b, 2, n, l))), torch.randn(b, n, l)
    options = dict(D=torch.randn(e), z=z, delta_bias=torch.randn(e), delta_softplus=True, return_last_state=True)
    options["initial_state"] = torch.randn(b, e, n)
    expected = selective_scan_fn(u, delta, A, B, C, **options)
    torch.testing.assert_close(one_loop(None, u, delta, A, B, C, **options), expected)
