"""`ssmzoo probe`: every probe on shipped checkpoints, files that can be read, and errors that say what to do."""

import pytest
import torch
from paths import CHECKPOINTS

from ssmzoo.cli.main import build_parser
from ssmzoo.probes.names import probes
from ssmzoo.probes.subject import Finding, Subject

APPLY = {  # probe: kinds of shipped checkpoints it is for
    "dsf": ("image", "language", "sd_ssm_D4"),
    "generalization_bound": ("image", "language"),
    "hidden_attention": ("image", "language", "sd_ssm_D4"),
    "local_attribution": ("restoration",),
    "memory": ("image", "language", "sd_ssm_D4"),
    "polynomial": ("image", "language", "sd_ssm_D4"),
    "recall": ("language",),
    "receptive_field": ("image",),
    "relevance": ("image", "language", "sd_ssm_D4"),
    "routing": ("experts",),
    "token_dynamics": ("image", "language"),
}
FAST = {
    ("dsf", "sd_ssm_D4"),
    ("generalization_bound", "language"),
    ("hidden_attention", "language"),
    ("memory", "sd_ssm_D4"),
    ("polynomial", "sd_ssm_D4"),
    ("receptive_field", "image"),
    ("relevance", "image"),
    ("routing", "experts"),
    ("token_dynamics", "language"),
}
CASES = [
    pytest.param(name, kind, marks=() if (name, kind) in FAST else pytest.mark.slow)
    for name, kinds in APPLY.items()
    for kind in kinds
]


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


@pytest.mark.parametrize(
    "name, kind, message",
    [
        ("recall", "image", "applies to language models"),
        ("recall", "sd_ssm_D4", "applies to language models"),
        ("generalization_bound", "sd_ssm_D4", "probes dsf, hidden_attention, memory and relevance apply"),
        ("receptive_field", "sd_ssm_D4", "needs an image model"),
        ("receptive_field", "language", "needs an image model"),
        ("token_dynamics", "sd_ssm_D4", "no residual stream"),
        ("expressivity", "image", "not with data=formal"),
        ("expressivity", "language", "not with data=formal"),
    ],
)
def test_probes_say_which_models_they_are_for(name, kind, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(name, CHECKPOINTS / kind, "--out", tmp_path)


@pytest.mark.parametrize("name, message", [("vmamba_tin", "nearest: vmamba_tiny"), ("timm/swin_tin", "timm has no")])
def test_image_models_by_name_must_exist(name, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run("erf", name, "--out", tmp_path)


def test_released_weights_are_asked_for_and_never_replaced(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(ValueError, match="vmamba_tiny is not on this machine"):
        run("erf", "vmamba_tiny", "--pretrained", "--out", tmp_path / "out")
    with pytest.raises(ValueError, match="no released weights are known for 'swinir'"):
        run("erf", "swinir", "--pretrained", "--out", tmp_path / "out")
    with pytest.raises(ValueError, match="has weights of its own"):
        run("erf", CHECKPOINTS / "image", "--pretrained", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["mambair", "swinir", pytest.param("mambair_unet", marks=pytest.mark.slow)])
def test_receptive_fields_of_restoration_models(name, tmp_path, capsys):
    run("erf", name, "--batch", 1, "--out", tmp_path)
    assert f"model: {name} with initial weights, not trained" in capsys.readouterr().out
    assert "with initial weights, not trained" in (tmp_path / "summary.md").read_text()
    sides = [float(row.split(",")[1]) for row in (tmp_path / "shares.csv").read_text().splitlines()[1:]]
    assert sides == sorted(sides) and 0 < sides[0] <= 1


@pytest.mark.parametrize("option", ["--length", "--batch", "--max-bytes"])
@pytest.mark.parametrize("value", ["0", "-3", "x", "nan"])
def test_numbers_that_cannot_work_are_refused_in_a_line(option, value, capsys):
    with pytest.raises(SystemExit) as stop:
        run("memory", CHECKPOINTS / "language", option, value)
    assert stop.value.code == 2 and f"argument {option}: '{value}' is no" in capsys.readouterr().err


@pytest.fixture(scope="module")
def transformer(tmp_path_factory):
    """A checkpoint without any scan: the language model's, with another model in it."""
    import ssmzoo
    from ssmzoo.checkpoint_files import find_checkpoint, read_manifest
    from ssmzoo.train.checkpoint import write_checkpoint

    torch.manual_seed(0)
    sizes = dict(vocab_size=256, d_model=32, n_blocks=1, n_heads=2)
    model = ssmzoo.create_model("transformer", **sizes)
    manifest = read_manifest(find_checkpoint(CHECKPOINTS / "language"))
    node = {"_target_": f"{type(model).__module__}.{type(model).__name__}", **sizes}
    kept = {k: v for k, v in manifest.items() if k not in ("files", "tied", "format")} | {"model": "transformer"}
    folder = tmp_path_factory.mktemp("run") / "checkpoint"
    write_checkpoint(folder, model.state_dict(), kept | {"config": manifest["config"] | {"model": node}})
    return folder


@pytest.mark.parametrize("name", ["generalization_bound", "dsf", "polynomial"])
def test_probes_of_scans_say_what_applies_to_a_model_without_scans(name, transformer, tmp_path):
    with pytest.raises(ValueError, match="ran no scan.*relevance, memory, recall .*token_dynamics.* still apply"):
        run(name, transformer, "--out", tmp_path)


@pytest.mark.parametrize("name", ["hidden_attention", "relevance", "memory", "recall", "token_dynamics"])
def test_and_those_apply(name, transformer, tmp_path, capsys):
    run(name, transformer, "--out", tmp_path, "--length", 16, "--batch", 1)
    assert "written to" in capsys.readouterr().out


def test_rows_of_a_long_prompt_fit_where_its_matrices_do_not(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("x = 1\n" * 60)
    words = [
        "hidden_attention",
        CHECKPOINTS / "language",
        "--input",
        f"@{text}",
        "--length",
        400,
        "--layers",
        "0",
        "--channels",
        "3",
        "--max-bytes",
        "1500000",
        "--out",
        tmp_path / "out",
    ]
    with pytest.raises(ValueError, match="more than max_bytes = 1,500,000.*attention_rows"):
        run(*words)
    run(*words, "--positions", "100,359")
    rows = (tmp_path / "out" / "rows.csv").read_text().splitlines()
    assert len(rows) == 1 + 101 + 360 and "--max-bytes 1.5e+06" in (tmp_path / "out" / "summary.md").read_text()
    with pytest.raises(ValueError, match=r"positions \[360\] do not exist"):
        run(*words, "--positions", "360")


def test_masks_are_read_and_scored(tmp_path):
    import numpy as np

    truth = np.zeros((2, 8, 8), dtype=np.uint8)
    truth[:, 2:6] = 1
    np.save(tmp_path / "masks.npy", truth)
    words = ["hidden_attention", CHECKPOINTS / "image", "--batch", "2", "--out", tmp_path, "--masks"]
    run(*words, tmp_path / "masks.npy")
    table = (tmp_path / "segmentation.csv").read_text()
    assert "rollout_cls_row" in table and "pixel accuracy (%)" in table
    assert (tmp_path / "perturbation.csv").read_text().count("true") == 6
    with pytest.raises(ValueError, match=r"has shape \(2, 8, 8\); expected .* for the 3 images"):
        run(*words, tmp_path / "masks.npy", "--batch", "3")
    with pytest.raises(ValueError, match="no such file"):
        run(*words, "nowhere.png")
    with pytest.raises(ValueError, match="for images"):
        run("relevance", CHECKPOINTS / "language", "--masks", "otsu")


@pytest.mark.parametrize(
    "words, message",
    [
        (["hidden_attention", "nowhere"], "no checkpoint"),
        (["hidden_attention", CHECKPOINTS / "image", "--layers", "9"], r"layers \[9\] do not exist"),
        (["hidden_attention", CHECKPOINTS / "image", "--channels", "999"], "channels"),
        (["hidden_attention", CHECKPOINTS / "image", "--max-bytes", "5000"], "max_bytes = 5,000"),
        (["relevance", CHECKPOINTS / "image", "--target", "99"], "target 99"),
        (["relevance", CHECKPOINTS / "image", "--input", "nothing.png"], "no such picture"),
        (["hidden_attention", CHECKPOINTS / "language", "--input", "x" * 200], "200 tokens, more than --length 128 "),
        (["hidden_attention", CHECKPOINTS / "language", "--input", "x"], "give at least 2"),
    ],
)
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
