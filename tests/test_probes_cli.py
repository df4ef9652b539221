"""`ssmzoo probe`: every probe on shipped checkpoints, files that can be read, and errors that say what to do."""

from pathlib import Path

import pytest
import torch

from ssmzoo.cli.main import build_parser
from ssmzoo.probes.subject import Finding, Subject, probes

CHECKPOINTS = Path(__file__).parent.parent / "notebooks" / "checkpoints"
APPLY = {  # probe: kinds of shipped checkpoints it is for
    "dsf": ("image", "language", "sd_ssm_D4"), "generalization_bound": ("image", "language"),
    "hidden_attention": ("image", "language", "sd_ssm_D4"), "memory": ("image", "language", "sd_ssm_D4"),
    "polynomial": ("image", "language"), "recall": ("language",), "receptive_field": ("image",),
    "relevance": ("image", "language", "sd_ssm_D4"), "token_dynamics": ("image", "language"),
}
CASES = [(name, kind) for name, kinds in APPLY.items() for kind in kinds]


def run(*words):
    args = build_parser().parse_args(["probe", *map(str, words)])
    return args.run(args)


def test_every_probe_is_covered():
    assert set(probes()) - {"expressivity"} == set(APPLY)


@pytest.mark.parametrize("name, kind", CASES)
def test_probe_writes_what_it_found(name, kind, tmp_path, capsys):
    if name in ("relevance", "hidden_attention") and kind == "image":
        pytest.importorskip("timm")
    run(name, CHECKPOINTS / kind, "--out", tmp_path, "--length", 24, "--batch", 2)
    said = capsys.readouterr().out
    assert f"written to {tmp_path}" in said and "nan" not in said
    text = (tmp_path / "summary.md").read_text()
    pictures = list(tmp_path.glob("*.png"))
    assert text.startswith(f"# {name}") and pictures and list(tmp_path.glob("*.csv"))
    assert all(f"({file.name})" in text for file in pictures)


@pytest.mark.parametrize("name, kind", [("recall", "image"), ("generalization_bound", "sd_ssm_D4"),
                                        ("receptive_field", "sd_ssm_D4"), ("token_dynamics", "sd_ssm_D4")])
def test_probes_say_which_models_they_are_for(name, kind, tmp_path):
    with pytest.raises(ValueError):
        run(name, CHECKPOINTS / kind, "--out", tmp_path)


@pytest.mark.parametrize("words, message", [
    (["hidden_attention", "nowhere"], "no checkpoint"),
    (["hidden_attention", CHECKPOINTS / "image", "--layers", "9"], r"layers \[9\] do not exist"),
    (["hidden_attention", CHECKPOINTS / "image", "--channels", "999"], "channels"),
    (["hidden_attention", CHECKPOINTS / "image", "--max-bytes", "5000"], "max_bytes = 5,000"),
    (["relevance", CHECKPOINTS / "image", "--target", "99"], "target 99"),
    (["relevance", CHECKPOINTS / "image", "--input", "nothing.png"], "no such picture"),
])
def test_bad_input(words, message, tmp_path):
    with pytest.raises((ValueError, OSError), match=message):
        run(*words, "--out", tmp_path)


@pytest.mark.slow
def test_expressivity_reads_the_automaton_of_the_run(tmp_path, capsys):
    run("expressivity", CHECKPOINTS / "sd_ssm_D4", "--out", tmp_path)
    assert "transitions that lead to the right state" in capsys.readouterr().out
    assert (tmp_path / "summary.md").exists() and (tmp_path / "drift.png").exists()
    with pytest.raises(ValueError):
        run("expressivity", CHECKPOINTS / "image", "--out", tmp_path)


def test_unknown_probe_is_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        run("hiden_attention", CHECKPOINTS / "image")
    assert stop.value.code == 2 and "hidden_attention" in capsys.readouterr().err


def test_finding_is_written_as_tables_and_text(tmp_path):
    finding = Finding({"a": "1"}, {"t": (("x", "y"), [(1, "2, 3")])})
    files = finding.write(tmp_path / "new" / "folder", "title", "command")
    assert [f.name for f in files] == ["summary.md", "t.csv"]
    assert files[1].read_text().splitlines() == ["x,y", '1,"2, 3"'] and "| a | 1 |" in files[0].read_text()
    subject = Subject(torch.nn.Identity(), torch.rand(1, 3, 4, 4), labels=["\n"])
    assert subject.is_image and subject.token(0) == r"\n" and subject.answer(3) == "3"
