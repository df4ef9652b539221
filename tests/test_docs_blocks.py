"""What the pages tell people to type works: every block of shell and Python, at a small size.

Fast: every command is understood (arguments parsed, configurations composed and checked, Python compiled), and FAST
pages run from top to bottom. Slow: every page does, as one session in a folder of its own. NOT_RUN says what is left
out, and why.
"""

import ast
import os
import re
import shlex
import subprocess
import sys

import pytest
from paths import ROOT

PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
FAST = ("docs/index.md", "docs/gpu.md")
NOT_RUN = {
    r"^(make|source) ": "what every test begins with",
    r"pretrained|mamba_130m|predict vmamba_tiny|hf_text|weights fetch": "fetches weights or data over the network",
    r"pyg/": "fetches data over the network, with an extra",
    r"trainer=(ddp|fsdp|slurm)|sbatch|torchrun|^--wrap": "needs several GPUs or machines",
    r"optuna|hparams_search": "needs the extra sweep",
    r"python benchmarks/|ssmzoo bench": "measured by hand; takes minutes",
    r"--lm-eval|inference\.lm_eval|--to (gguf|onnx)": "needs an extra that the tests do not have",
    r"logger=wandb": "asks for an account",
    r"ssmzoo demo": "tests/test_demo.py",
    r"^pip install|pip install -e": "installs",
    r"ssmzoo completion": "tests/test_completion.py",
    r"compile=true": "compiles for minutes",
    r"x2\.pth|my_table\.yaml|my\.txt|photos/|mine\.npz|(mine|other)\.csv|=PSM|path=mine ": "a file of the reader's",
    r"my_folder|=COCO|=BEAT2|picture\.jpg": "files of the reader",
    r"other\.txt|path=pictures/": "files of the reader",
}
PRELUDE = {  # what a page's Python takes as given
    "docs/tutorial.md": """
import torch, ssmzoo
u, delta = torch.rand(2, 2, 4, 8)
A, B, C, h = -torch.rand(4, 3), *torch.rand(2, 2, 3, 8), None
""",
    "docs/probes.md": """
import ssmzoo, torch
model, ids = ssmzoo.create_model("mamba", vocab_size=256).eval(), torch.randint(256, (1, 32))
""",
}
NOT_RUN_PAGES = {
    "CONTRIBUTING.md": "tests/test_new_model.py runs its example",
    "docs/architecture.md": "excerpts of the code",
    "docs/scaling.md": "several GPUs",
}


def blocks(page) -> list[tuple[str, str]]:
    """[(language, code)] of a page's fences of shell and Python, without the indentation of lists."""
    found = re.findall(r"^( *)```(bash|python)\n(.*?)^ *```", page.read_text(encoding="utf-8"), re.M | re.S)
    return [(kind, re.sub(rf"^{indent}", "", code, flags=re.M)) for indent, kind, code in found]


def left_out(line: str) -> str | None:
    return next((reason for pattern, reason in NOT_RUN.items() if re.search(pattern, line)), None)


def lines(code: str) -> list[str]:
    """Lines of a shell block with their continuations."""
    return code.replace("\\\n", " ").splitlines()


def commands(page) -> list[list[str]]:
    """Words of every train.py, eval.py and ssmzoo line of a page's shell blocks."""
    found = []
    for kind, code in blocks(page):
        for line in lines(code) if kind == "bash" else []:
            if re.match(r"(\w+=\S+ )*(python (train|eval)\.py|ssmzoo) ?", line):
                words = shlex.split(line, comments=True)
                found.append([w for i, w in enumerate(words) if not re.match(r"[A-Z_]+=", w)])
    return found


NAMED = [p for p in PAGES if blocks(p)]


def name(page) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", NAMED, ids=name)
def test_every_command_is_understood(page):
    from ssmzoo.cli import main

    for words in commands(page):
        if any("..." in w or w.isupper() for w in words):
            continue
        if words[0] == "ssmzoo" and words[1] not in ("train", "eval"):
            main.parse(words[1:])
        elif "eval" not in words[1]:
            composed([w for w in words[2:] if w != "-m"])
    for kind, code in blocks(page):
        if kind == "python":
            ast.parse(code)


@pytest.mark.parametrize("page", NAMED, ids=name)
def test_runs_that_a_page_names_are_made_on_it(page):
    """runs/MODEL/NAME of a command: NAME, or what a command before it wrote (a sweep writes NAME-0, NAME-1, ...)."""
    made = set()
    for words in commands(page):
        typed = dict(w.partition("=")[::2] for w in words if "=" in w)
        for run in re.findall(r"\bruns/\w+/[\w-]+", " ".join(words)):
            assert run.endswith("/NAME") or run in made or words[1] == "demo", f"nothing before made {run}"
            if words[1] == "quantise":
                made.add(f"{run}-{words[words.index('--mode') + 1]}")
        if "name" in typed and "-m" not in words and "resume" not in typed:
            model = typed.get("config", "").split("/")[1:2] or [typed.get("model", "moe_mamba")]
            made.add(f"runs/{model[0]}/{typed['name']}")


def composed(arguments: list[str]) -> None:
    """The configuration that train.py would run, checked; of a sweep the first of every choice."""
    from hydra import compose, initialize_config_dir

    from ssmzoo.presets import config_dir
    from ssmzoo.train import config

    if any(a.startswith(("resume=", "config=", "--", "hparams_search=", "hydra")) for a in arguments):
        return
    swept = [re.sub(r"^([\w.]+=)([\w.-]+),[\w.,-]*$", r"\1\2", a) for a in arguments]
    config.register_resolvers()
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        config.check(compose("train", config.free_overrides(config.paired_overrides(swept))))


def test_every_reason_to_leave_something_out_is_needed():
    text = "\n".join(line for p in PAGES for _, code in blocks(p) for line in lines(code))
    assert [p for p in NOT_RUN if not re.search(p, text, re.M)] == []
    assert all((ROOT / page).exists() for page in NOT_RUN_PAGES)


@pytest.mark.parametrize(
    "page",
    [pytest.param(p, marks=() if name(p) in FAST else pytest.mark.slow) for p in NAMED if name(p) not in NOT_RUN_PAGES],
    ids=name,
)
def test_a_page_runs_from_top_to_bottom(page, tmp_path):
    for file in ("train.py", "eval.py", "configs", "tests", "notebooks", "benchmarks", "README.md", "constraints.txt"):
        (tmp_path / file).symlink_to(ROOT / file)
    programs = tmp_path / "bin"
    programs.mkdir()
    for program in ("python", "ssmzoo"):
        script = f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {ROOT / "tests/small.py"} {program} "$@"\n'
        (programs / program).write_text(script)
        (programs / program).chmod(0o755)
    environment = os.environ | {
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "SSMZOO_CACHE": str(tmp_path / "cache"),
    }

    def run(code, *command):
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1200)
        assert done.returncode == 0, f"{name(page)}:\n{code}\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}"

    for run_folder in sorted(set(re.findall(r"runs/(\w+)/NAME", page.read_text(encoding="utf-8")))):
        run("a run to begin with", programs / "python", "train.py", f"model={run_folder}", "name=NAME")
    session = []
    for kind, code in blocks(page):
        if kind == "bash":
            kept = [line if left_out(line) is None else ":" for line in lines(code)]
            run(code, "bash", "-euo", "pipefail", "-c", "\n".join(kept))
        elif left_out(code) is None:
            session.append(code)  # a page's Python is one session
            run(code, sys.executable, "-c", "\n".join([PRELUDE.get(name(page), ""), *session]))
