"""`ssmzoo new model|task|automaton NAME`: the files of CONTRIBUTING.md's hour, ready to train and to be changed."""

from __future__ import annotations

import argparse
import keyword
from pathlib import Path

from ssmzoo.presets import config_dir

PARTS = Path(__file__).parent / "new_parts"
FILES = {  # what is written, by its template
    "model": {"model.py": "ssmzoo/models/{name}.py", "model.yaml": "configs/model/{name}.yaml"},
    "task": {"task.py": "ssmzoo/tasks/{name}.py", "task.yaml": "configs/task/{name}.yaml"},
    "automaton": {"automaton.yaml": "{name}.yaml"},
}
NEXT = {
    "model": """It trains already, as the small recurrence that stands in it:
  python train.py model={name}
  ssmzoo info {name}
Then: your equations in the header and the blocks, a row in README's table; ssmzoo/released/{name}.py and
tests/golden/{name}/ where weights or an official implementation exist (CONTRIBUTING.md).""",
    "task": """It trains already:
  python train.py model=mamba task={name}
Then: your loss and metrics in `step`, what the report says in `report` (ssmzoo/tasks/language.py has both).""",
    "automaton": """It trains already:
  python train.py model=sd_ssm data=formal data.automaton={name}.yaml
Then: your states and transitions. A language with a name of its own is a function in
ssmzoo/data/automata_library.py (CONTRIBUTING.md).""",
}


def add_parser(subparsers) -> argparse.ArgumentParser:
    parser = subparsers.add_parser("new", help="write the files of a new model, task or automaton")
    parser.add_argument("what", choices=sorted(FILES), help="model and task: into this checkout; automaton: here")
    parser.add_argument("name", help="of the file, such as my_system")
    return parser


def run(args) -> None:
    name = args.name
    if not name.isidentifier() or keyword.iskeyword(name) or name != name.lower():
        raise ValueError(f"{name!r} cannot be the name of a file of Python; use small letters, digits and _, my_system")
    title = name.replace("_", " ").capitalize()
    words = {"{name}": name, "{title}": title, "{Class}": "".join(w.capitalize() for w in name.split("_"))}
    home = Path() if args.what == "automaton" else checkout()
    files = {part: home / path.format(name=name) for part, path in FILES[args.what].items()}
    for file in files.values():
        if file.exists():
            raise ValueError(f"{file} is there already; choose another name")
    for part, file in files.items():
        text = (PARTS / f"{part}.txt").read_text(encoding="utf-8")
        for word, value in words.items():
            text = text.replace(word, value)
        file.write_text(text, encoding="utf-8")
        print(f"wrote {file}")
    print(NEXT[args.what].format(name=name))


def checkout() -> Path:
    """The folder that holds ssmzoo/ and configs/."""
    root = config_dir().parent
    if not (root / "ssmzoo" / "models").is_dir():
        raise ValueError(f"ssmzoo is installed in {root}; models and tasks are added in a checkout (make setup)")
    return root
