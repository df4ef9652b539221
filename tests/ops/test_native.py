"""Compiled kernels serve only beside the sources that they were compiled from."""

import shutil

import pytest
import torch

from ssmzoo.ops import native
from ssmzoo.ops.native.sources import OPERATORS, source_hash

SOURCES = sorted(f.relative_to(OPERATORS) for ending in "ch" for f in OPERATORS.glob(f"*/*.{ending}"))
LIBRARIES = sorted(OPERATORS.glob("native/_kernels.*.so"))


@pytest.fixture
def copy(tmp_path):
    for file in SOURCES + [f.relative_to(OPERATORS) for f in LIBRARIES]:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        shutil.copy(OPERATORS / file, tmp_path / file)
    return tmp_path


@pytest.mark.skipif(not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="no C compiler: PyTorch serves")
def test_kernels_are_there_where_a_compiler_is():
    """Without them the tests of kernels would be skipped, not fail."""
    assert native.MISSING is None, native.MISSING


@pytest.mark.skipif(not LIBRARIES, reason="no compiled kernels")
def test_a_library_of_other_sources_is_refused_and_the_words_say_what_to_run(copy):
    assert len(SOURCES) > 20
    assert native._load(copy / "native")[2] is None, f"run `{native.REBUILD}`, then these tests"
    for file in SOURCES:
        before = (copy / file).read_bytes()
        (copy / file).write_bytes(before + b"// changed\n")
        library, _, missing = native._load(copy / "native")
        assert library is None and native.REBUILD in missing, file
        (copy / file).write_bytes(before)
    (copy / "native/added.c").write_text("")
    assert native._load(copy / "native")[0] is None
    (copy / "native/added.c").rename(copy / "native/removed.txt")
    assert native._load(copy / "native")[2] is None


@pytest.mark.skipif(not LIBRARIES, reason="no compiled kernels")
def test_without_sources_the_library_alone_serves(copy):
    for file in SOURCES:
        (copy / file).unlink()
    assert source_hash(copy) == "" and native._load(copy / "native")[2] is None


def test_a_source_counts_by_its_place_and_its_content(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/x.c").write_text("int f;")
    first = source_hash(tmp_path)
    (tmp_path / "a/x.c").rename(tmp_path / "a/y.c")
    assert source_hash(tmp_path) not in ("", first)


def test_weights_gathered_in_huge_pages_are_what_they_were():
    large, small = torch.arange(native.MUCH // 4 + 1000, dtype=torch.float32), torch.arange(7)
    copies = large.clone(), small.clone()
    native.gather([large[5:], small, torch.empty(0), torch.empty(3, device="meta")])
    assert torch.equal(large, copies[0]) and torch.equal(small, copies[1])
