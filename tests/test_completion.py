"""Shells complete commands, models, tasks and runs, and help is the same by either entry."""

import argparse
import os
import shutil
import subprocess
import sys

import pytest
from paths import ROOT

from ssmzoo.cli import completion, main


def test_the_parser_is_built_without_torch():
    code = "import sys, ssmzoo.cli.main as m; m.build_parser(); assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_keys_and_values_of_train(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/mamba/first").mkdir(parents=True)
    (tmp_path / "runs/mamba/first/config.yaml").write_text("")
    assert completion.overrides("mod") == ["model="]
    assert completion.overrides("model=sd") == ["model=sd_ssm"]
    assert completion.overrides("task=lang") == ["task=language"]
    assert completion.overrides("resume=") == ["resume=runs/mamba/first"]
    assert completion.overrides("model=nosuch") == [] and completion.overrides("optim.lr=1") == []
    assert completion.runs("runs/") == ["runs/mamba/first"] and completion.runs("ru") == ["runs/mamba/first"]
    assert completion.runs("nosuch") == []


def test_every_named_argument_is_one_of_the_parsers():
    parser = main.build_parser()
    found = set()

    def walk(parser, command=""):
        for action in parser._actions:
            found.add((command, action.dest))
            for name, sub in action.choices.items() if isinstance(action, argparse._SubParsersAction) else ():
                walk(sub, name)

    walk(parser)
    assert set(completion.NAMES) <= found


SCRIPTS = {
    "bash": """eval "$(ssmzoo completion bash)"
COMP_LINE="$ASKED"; COMP_POINT=${#COMP_LINE}; COMP_WORDS=($COMP_LINE); COMP_CWORD=$((${#COMP_WORDS[@]}-1)); COMP_TYPE=9
_python_argcomplete ssmzoo; printf '%s\\n' "${COMPREPLY[@]}" """,
    "zsh": r"""zmodload zsh/zpty && zpty z zsh -f -i
zpty -w z 'PS1=; autoload -Uz compinit; compinit -u -D; eval "$(ssmzoo completion zsh)"; print READY$((1+1))'
while zpty -r z line; do [[ $line == *READY2* ]] && break; done
zpty -n -w z "$ASKED"$'\t'; text=
repeat 200; do while zpty -rt z line; do text+=$line; done; [[ $text == *$FOUND* ]] && break; sleep 0.05; done
print -r -- $text; zpty -d z""",
    "fish": 'ssmzoo completion fish | source; complete -C "$ASKED"',
}


@pytest.mark.parametrize("asked, found", [("ssmzoo info mamba_1", "mamba_130m"), ("ssmzoo train model=sd", "sd_ssm")])
@pytest.mark.parametrize("shell", SCRIPTS)
def test_a_shell_is_answered(tmp_path, shell, asked, found):
    pytest.importorskip("argcomplete", reason="pip install argcomplete")
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell} here")
    program = tmp_path / "ssmzoo"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m ssmzoo.cli.main "$@"\n')
    program.chmod(0o755)
    environment = os.environ | {
        "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "ASKED": asked,
        "FOUND": found,
    }
    done = subprocess.run([shell, "-c", SCRIPTS[shell]], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert found in done.stdout, done.stderr


def test_help_is_the_same_by_either_entry(call):
    one, other = call("--help"), call("train", "--help", entry="ssmzoo")
    assert one[0] == other[0] == 0 and one[1] == other[1] and "model=NAME" in one[1]
