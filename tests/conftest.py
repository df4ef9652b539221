import atexit
import copy
import gc
import logging
import os
import sys

import pytest
from tried import COUNTS

from ssmzoo._torchvision import make_importable
from ssmzoo.threads import wait_asleep

wait_asleep()  # where a test asks for two threads on a core that others use, they would spin
import torch  # noqa: E402

# compiled files are kept whatever the environment says: a hundred processes of these tests import the package
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
SILENT = logging.NullHandler()
make_importable()  # in the controlling process of pytest-xdist too, which imports the classes of warnings it is sent


if not torch.accelerator.is_available():

    def manual_seed(seed):
        """As torch's, which keeps three formatted stacks for GPUs that may come, at every call."""
        return torch.default_generator.manual_seed(int(seed))

    torch.manual_seed = manual_seed


def pytest_terminal_summary(terminalreporter):
    for what, count in sorted(COUNTS.items()):
        terminalreporter.write_line(f"tried: {count:,} {what}")


def pytest_collection_finish():
    gc.freeze()  # the millions of objects of imports and collection: no later collection looks at them again
    atexit.register(gc.unfreeze)
    read_each_file_once()


def read_each_file_once():
    """Hydra parses a file of configs/ again for each of the thousand configurations that the tests compose."""
    from hydra._internal.core_plugins.file_config_source import FileConfigSource

    read, known = FileConfigSource.load_config, {}

    def load_config(self, config_path):
        file = os.path.join(self.path, self._normalize_file_name(config_path))
        key = (file, self.provider, os.stat(file).st_mtime_ns if os.path.exists(file) else None)
        if key not in known:
            known[key] = read(self, config_path)
        return copy.deepcopy(known[key])

    FileConfigSource.load_config = load_config


def pytest_unconfigure():
    if "forked" in sys.modules:
        sys.modules["forked"].stop()


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    logging.getLogger().addHandler(SILENT)  # where no handler is, logged warnings are printed among a command's lines


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """Run train.py, eval.py or ssmzoo in this process, from the test's folder: (exit status, stdout, stderr).

    Figures are drawn with matplotlib's margins: fitting these to the words takes half of the drawing.
    """
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ConstrainedLayoutEngine, "execute", lambda *_: None)

    def run(*arguments, entry="train"):
        from ssmzoo.cli import main, train

        monkeypatch.setattr(sys, "argv", [entry, *arguments])
        status = 0
        try:
            {"train": train.train, "eval": train.evaluate, "ssmzoo": main.main}[entry]()
        except SystemExit as stop:
            status = stop.code or 0
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return run
