"""YAML of strangers: the same values as OmegaConf reads, bounded, and nothing but plain containers."""

import pytest
from omegaconf import OmegaConf
from tried import tried

from ssmzoo.presets import config_dir
from ssmzoo.safe_yaml import parse_yaml, read_yaml
from ssmzoo.terminal import plain_output, printable

LINES = [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
BOMB = "\n".join(["a0: &a0 [x, x, x, x, x, x, x, x, x, x]", *LINES])
SCALARS = "1e-3 1 1.5 -1.0e+5 2026-11-30 0x10 1_000 1:30 .5 yes ~ null .inf -.inf 1e5 . 1. 1.5e 08 0o7 12e03 +1e-05"


@pytest.mark.parametrize("file", sorted(config_dir().rglob("*.yaml")), ids=lambda f: f.stem)
def test_our_files_read_as_omegaconf_reads_them(file):
    assert (read_yaml(file) or {}) == OmegaConf.to_container(OmegaConf.load(file))


@pytest.mark.parametrize("scalar", SCALARS.split())
def test_scalars_have_the_types_that_omegaconf_gives_them(scalar):
    ours, theirs = parse_yaml(f"a: {scalar}")["a"], OmegaConf.create(f"a: {scalar}").a
    assert (type(ours), ours) == (type(theirs), theirs)


@pytest.mark.parametrize(
    "text, words",
    [
        (BOMB, "more than 200,000 values"),
        ("a: &a {b: *a}", "or itself"),
        ("[" * 10_000, "nested too deeply"),
        ("a: !!python/object/apply:os.system [ls]", "python/object"),
        ("a: 1\na: 2", "'a' is given twice"),
        ("a: " + "9" * 10_000, "cannot be read"),
        ("a: *b", "undefined alias"),
        ("a: [", "not valid YAML"),
        ("a: 1\0", "not valid YAML"),
        ("a: \ud800".encode("utf-8", "surrogatepass").decode("utf-8", "replace") + "\x07", "not valid YAML"),
    ],
)
def test_what_is_hostile_or_broken_is_refused_at_once_by_name(tmp_path, text, words):
    tried("hostile YAML files")
    file = tmp_path / "foreign.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match="foreign.yaml") as refused:
        read_yaml(file)
    assert words in str(refused.value)


@pytest.mark.parametrize("text, words", [("[" * 100_000, "nested too deeply"), ("{", "not valid JSON")])
def test_json_is_read_as_json(tmp_path, text, words):
    file = tmp_path / "foreign.json"
    file.write_text('{"delta": [[0, 1.5, null]]}')
    assert read_yaml(file) == {"delta": [[0, 1.5, None]]}
    file.write_text(text)
    with pytest.raises(ValueError, match=f"foreign.json .*{words}"):
        read_yaml(file)


def test_aliases_that_people_write_are_read():
    assert parse_yaml("base: &b {x: 1}\nmore: {<<: *b, y: 2}\nagain: *b")["more"] == {"x": 1, "y": 2}


def test_a_large_file_is_refused_before_it_is_read(tmp_path):
    file = tmp_path / "large.yaml"
    file.write_bytes(b"#" * 2000)
    with pytest.raises(ValueError, match="more than 1,000: refused"):
        read_yaml(file, largest=1000)


def test_control_codes_are_written_out(capsys):
    assert printable("a\tb\nc é \U0001f600") == "a\tb\nc é \U0001f600"
    with plain_output():
        print("name \x1b[2J\x9b1m\x07 \u202egnp.exe")
    assert capsys.readouterr().out == "name \\x1b[2J\\x9b1m\\x07 \\u202egnp.exe\n"
