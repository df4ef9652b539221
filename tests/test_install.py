"""What `make setup` leaves works from every folder, in any order of imports; a wheel works without a checkout."""

import os
import subprocess
import sys
import tarfile
import zipfile

import pytest
from paths import ROOT

SHOW = "import ssmzoo; print(len(ssmzoo.list_models()), ssmzoo.create_model('rnn').__class__.__name__)"


def python(code, cwd, **environment):
    plain = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | environment
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, env=plain, capture_output=True, text=True)


def few_of(*others: str) -> list:
    """Each costs a start of Python with all libraries."""
    return [pytest.param(other, marks=pytest.mark.slow) for other in others]


@pytest.mark.parametrize(
    "folder", ["above", "with a folder of the same name", *few_of("inside", "beside", "notebooks")]
)
def test_found_from_every_folder(tmp_path, folder):
    (tmp_path / "ssmzoo").mkdir()  # what a clone of the default name looks like from above: an empty namespace
    folders = {"above": ROOT.parent, "inside": ROOT, "beside": tmp_path / "ssmzoo", "notebooks": ROOT / "notebooks"}
    found = python(SHOW, folders.get(folder, tmp_path))
    assert found.returncode == 0, found.stderr
    count, name = found.stdout.split()
    assert int(count) >= 100 and name == "RNNModel"


FORKS = """
import contextlib, os, torch._dynamo
with contextlib.suppress(ImportError):
    import wandb  # neither of them imports those whose order matters
for first in {firsts!r}:
    if os.fork() == 0:
        exec(f"import {{first}}, timm, ssmzoo.timm")
        os._exit(len(timm.list_models("vmamba_*")) < 8)
    assert os.wait()[1] == 0, first
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(
    "firsts",
    [
        ("torchvision", "torchmetrics", "ssmzoo.timm"),
        pytest.param(("timm", "lightning", "ssmzoo.data.images"), marks=pytest.mark.slow),
    ],
)
def test_any_library_may_be_imported_first(tmp_path, firsts):
    """Each in a process forked from one that has imported what is not ours and takes seconds."""
    found = python(FORKS.format(firsts=firsts), tmp_path)
    assert found.returncode == 0, found.stdout + found.stderr


@pytest.mark.slow
def test_a_wheel_holds_configs_benchmarks_sources_and_kernels(tmp_path):
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        str(ROOT),
        "-w",
        tmp_path,
    ]
    subprocess.run(command, check=True)
    (wheel,) = tmp_path.glob("ssmzoo-*.whl")
    target = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    names = {str(f.relative_to(target)) for f in target.rglob("*") if f.is_file()}
    sources = {
        str(f.relative_to(ROOT))
        for f in (ROOT / "ssmzoo").rglob("*")
        if f.suffix in (".py", ".c", ".h", ".cpp", ".js", ".css", ".txt")
    }
    assert sources <= names
    configs = {f"ssmzoo/{f.relative_to(ROOT)}" for f in (ROOT / "configs").rglob("*.yaml")}
    assert configs <= names and "ssmzoo/benchmarks/ops.py" in names
    code = f"{SHOW}; print(ssmzoo.__file__); from ssmzoo.ops.native import MISSING; print(MISSING)"
    found = python(code, tmp_path, PYTHONPATH=str(target))
    assert str(target) in found.stdout and found.stdout.splitlines()[-1] == "None", found.stdout + found.stderr


@pytest.mark.slow
def test_a_source_distribution_holds_what_a_wheel_is_built_from(tmp_path):
    """`python -m build` makes the wheel from it, not from the checkout."""
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    kinds = {
        "configs": ("*.yaml",),
        "benchmarks": ("*.py",),
        "ssmzoo": ("*.py", "*.c", "*.h", "*.js", "*.css", "*.txt"),
    }
    wanted = {
        f.relative_to(ROOT).as_posix() for folder, ends in kinds.items() for e in ends for f in (ROOT / folder).rglob(e)
    }
    assert wanted <= names, sorted(wanted - names)[:5]
    assert "constraints.txt" in names and not [n for n in names if n.endswith((".so", ".pyc"))]
