"""`ssmzoo new` writes CONTRIBUTING's files under another name; what it wrote trains."""

import os
import re
import shutil
import textwrap

import forked
import pytest
from paths import ROOT

SMALL = (
    "data.path=train.py data.seq_len=16 data.batch_size=2 data.val_tokens=64 trainer.max_steps=2 runs_dir=runs name=a"
)


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A function that runs Python in a fresh copy of the package: (exit status, what it printed)."""
    root = tmp_path_factory.mktemp("copy")
    for part in ("ssmzoo", "configs"):
        shutil.copytree(ROOT / part, root / part, ignore=shutil.ignore_patterns("*.o"))
    shutil.copy(ROOT / "train.py", root)

    def python(*arguments):
        environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
        return forked.run(*arguments, cwd=root, env=environment)

    return root, python


@pytest.mark.parametrize("kind, part", [("python", "model.py"), ("yaml", "model.yaml")])
def test_the_template_is_contributings_example(kind, part):
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    example = textwrap.dedent(re.search(rf"   ```{kind}\n(.*?)   ```", page, re.S)[1])
    template = (ROOT / "ssmzoo/cli/new_parts" / f"{part}.txt").read_text(encoding="utf-8")
    for word, value in {"{Class}": "Integrator", "{name}": "mysystem", "{title}": "My system"}.items():
        template = template.replace(word, value)
    assert template == example


def test_a_new_model_with_a_new_task_trains_two_steps(copy):
    root, python = copy
    for what, name in (("model", "leaky_net"), ("task", "soft_tokens")):
        status, out = python("-m", "ssmzoo.cli.main", "new", what, name)
        assert status == 0 and f"{name}.py" in out and "python train.py" in out, out
    status, out = python("train.py", "model=leaky_net", "task=soft_tokens", "model.d_model=16", *SMALL.split())
    assert status == 0, out[-3000:]
    assert "val/accuracy" in (root / "runs/leaky_net/a/metrics.csv").read_text().splitlines()[0]
    assert "class LeakyNetLM(CausalLM)" in (root / "ssmzoo/models/leaky_net.py").read_text()
    status, out = python("-m", "ssmzoo.cli.main", "new", "model", "leaky_net")
    assert status == 2 and "is there already" in out


def test_a_new_automaton_is_read_and_run(call, tmp_path):
    from ssmzoo.data.automata import Automaton

    assert call("new", "automaton", "my_parity", entry="ssmzoo")[0] == 0
    found = Automaton.from_file(tmp_path / "my_parity.yaml")
    assert found.name == "my_parity"
    assert found.output[found.run(found.encode(["aab", "aaa"]))].tolist() == [[1, 0, 0], [1, 0, 1]]
    assert call("new", "automaton", "my_parity", entry="ssmzoo")[0] == 2


@pytest.mark.parametrize("name", ["My_System", "a-b", "class", "../x", "1a"])
def test_names_that_python_could_not_import_are_refused(call, tmp_path, name):
    status, _, err = call("new", "automaton", name, entry="ssmzoo")
    assert status == 2 and "cannot be the name" in err and not list(tmp_path.iterdir())
