"""torch.export programs give what the model gives, at other batches and many tokens later, without ssmzoo."""

import functools
import os

import exports
import forked
import pytest
import torch

from ssmzoo.inference.export import export
from ssmzoo.inference.export.to_torch_export import FILE, refuse
from ssmzoo.inference.export.traced import call_of, first_state, sides, tensors_of

FAST = ("mamba (text)", "mamba2 (text)", "vim", "mambair_classic_x2")
RUNS = [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in exports.RUNS]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A function: the model of a run and the folder of its program, made once."""

    @functools.cache
    def of(name):
        folder = tmp_path_factory.mktemp("exported")
        source = exports.source(name, folder / "run")
        return source, export(source, "torch_export", folder / "out")

    return of


@pytest.mark.parametrize("name", RUNS)
def test_the_program_computes_what_the_model_computes(name, exported, tmp_path):
    source = exports.source(name, tmp_path / "run")
    if reason := refuse(source):
        with pytest.raises(ValueError, match="has no layout 'torch_export'"):
            export(source, "torch_export", tmp_path / "out")
        assert len(reason) > 10
        return
    source, folder = exported(name)
    program = torch.export.load(folder / FILE).module()
    if source.kind == "language":
        ids = torch.randint(29, (3, 9))
        state = [torch.zeros(3, *t.shape[1:], dtype=t.dtype) for t in tensors_of(first_state(source.model))]
        logits = []
        for token in ids.split(1, dim=1):
            now, *state = program(token, *state)
            logits.append(now)
        return torch.testing.assert_close(
            torch.cat(logits, 1), exports.outputs(source.model, ids), rtol=1e-4, atol=1e-5
        )
    _, channels, height, width = call_of(source).inputs[0].shape  # the size of its training, where it takes no other
    for b, h, w in [(1, height, width), (5, height, width)] + ([(2, height + 4, width + 9)] if sides(source) else []):
        x = torch.rand(b, channels, h, w)
        torch.testing.assert_close(program(x), exports.outputs(source.model, x), rtol=1e-4, atol=1e-5)


def test_another_program_reads_it_without_ssmzoo(exported):
    _, out = exported("mamba (text)")
    block = (out / "README.md").read_text().split("```python\n")[1].split("```")[0]  # the model card's own lines
    check = "import sys\nassert logits.shape[:2] == (1, 1) and not any(m.startswith('ssmzoo') for m in sys.modules)"
    status, printed = forked.run("-c", f"{block}\n{check}", cwd=out, env=os.environ)
    assert status == 0, printed
