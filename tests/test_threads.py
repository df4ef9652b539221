"""Threads that wait sleep soon in our programs, unless the user or an earlier import of torch has decided."""

import json
import os
import subprocess
import sys

import pytest

from ssmzoo import threads

TOLD = "import json, os; print(json.dumps({k: os.environ.get(k) for k in ('GOMP_SPINCOUNT', 'KMP_BLOCKTIME')}))"


def told(code: str, **environment: str) -> dict:
    kept = {k: v for k, v in os.environ.items() if k not in threads.SETTINGS}
    found = subprocess.run([sys.executable, "-c", code + TOLD], capture_output=True, text=True, env=kept | environment)
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout.splitlines()[-1])


def test_programs_set_what_nobody_has_set():
    asleep = "from ssmzoo.threads import wait_asleep; wait_asleep();"
    assert told(asleep) == threads.SPINS
    assert told(asleep, OMP_WAIT_POLICY="active") == dict.fromkeys(threads.SPINS)
    assert told("import ssmzoo.ops;" + asleep) == dict.fromkeys(threads.SPINS)  # torch has read them: too late
    command = (
        "import contextlib\nfrom ssmzoo.cli.main import main\nwith contextlib.suppress(SystemExit): main(['{}'])\n"
    )
    assert told(command.format("list")) == threads.SPINS
    assert told(command.format("bench --list").replace("'bench --list'", "'bench', '--list'")) == dict.fromkeys(
        threads.SPINS
    )


@pytest.mark.parametrize(
    ("busy", "count", "says"), [(1.9, 2, True), (0.2, 2, False), (1.9, 1, False), (None, 2, False)]
)
def test_one_line_says_when_others_are_on_the_cores(monkeypatch, busy, count, says):
    monkeypatch.setattr(threads, "busy_cores", lambda: busy)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    line = threads.sharing(count)
    assert bool(line) == says and "\n" not in line
    if says:
        assert "1.9 of 2 cores" in line and "OMP_NUM_THREADS=1" in line


def test_busy_cores_are_counted():
    busy = threads.busy_cores()
    assert busy is None or 0 <= busy <= (os.cpu_count() or 1) + 0.5
