"""`make docs`: the site into build/site, strictly; installs the extra `docs` first where it is missing."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    if not all(map(importlib.util.find_spec, ("material", "mkdocstrings_handlers.python"))):
        extra = re.search(r"^docs = \[(.*?)\]$", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M | re.S)[1]
        wanted = re.findall(r'"([^"]+)"', extra)
        print(f"installing {', '.join(wanted)}", flush=True)
        pip = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        subprocess.run([*pip, "-c", str(ROOT / "constraints.txt"), *wanted], check=True)
    print("building the site: about two minutes", flush=True)
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet"]
    if subprocess.run(command, cwd=ROOT, env=environment).returncode:
        sys.exit("error: the site was not built; what is wrong stands above")
    print(f"open {ROOT / 'build' / 'site' / 'index.html'}")


if __name__ == "__main__":
    main()
