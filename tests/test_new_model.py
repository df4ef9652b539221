"""A new model is its own file and its config: the example of CONTRIBUTING.md in a fresh copy of the package."""

import os
import re
import shutil
import textwrap

import forked
import pytest
from paths import ROOT

USE = """
import torch, ssmzoo
from ssmzoo.probes.tap import tap
from ssmzoo.train.optim import parameter_roles
assert "mysystem" in ssmzoo.list_models("my*", task="language")
model = ssmzoo.create_model("mysystem", vocab_size=32, d_model=16)
roles = parameter_roles(model)
assert roles["blocks.0.layers.mixer.dt_bias"] == "bias" and roles["blocks.0.layers.mixer.in_proj.weight"] == "decay"
with tap(model) as scans:
    model(torch.randint(32, (2, 9)))
assert len(scans) == 2 and scans[0].decay().shape == (2, 16, 9, 1)
print("used")
"""


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The package with two more files, and a function that runs Python in it."""
    root = tmp_path_factory.mktemp("copy")
    for part in ("ssmzoo", "configs"):
        shutil.copytree(ROOT / part, root / part, ignore=shutil.ignore_patterns("*.o"))
    shutil.copy(ROOT / "train.py", root)
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    model, config = (re.search(rf"   ```{kind}\n(.*?)   ```", page, re.S)[1] for kind in ("python", "yaml"))
    (root / "ssmzoo/models/mysystem.py").write_text(textwrap.dedent(model))
    (root / "configs/model/mysystem.yaml").write_text(textwrap.dedent(config))

    def python(*arguments):
        environment = dict(os.environ, PYTHONPATH=str(root), OMP_NUM_THREADS="1")
        status, printed = forked.run(*arguments, cwd=root, env=environment)
        assert status == 0, printed[-3000:]
        return printed

    return root, python


def test_it_is_found_probed_and_its_parameters_have_roles(copy):
    _, python = copy
    assert "used" in python("-c", USE)
    assert "mysystem" in python("-m", "ssmzoo.cli.main", "list", "models")


def test_it_trains_resumes_and_generates(copy):
    root, python = copy
    sizes = ["data.path=train.py", "data.seq_len=16", "data.batch_size=2", "data.val_tokens=64", "task.sample_tokens=2"]
    python("train.py", "model=mysystem", "model.d_model=16", *sizes, "trainer.max_steps=2", "runs_dir=runs", "name=a")
    python("train.py", "resume=runs/mysystem/a", "trainer.max_steps=3")
    assert (root / "runs/mysystem/a/status.txt").read_text().startswith("finished")
    python("-m", "ssmzoo.cli.main", "generate", "runs/mysystem/a", "--prompt", "import", "--max-new-tokens", "3")
