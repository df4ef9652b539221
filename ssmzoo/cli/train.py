"""Hydra around the trainer: `python train.py ...` and `ssmzoo train ...`. Errors are one message and an exit status."""

from __future__ import annotations

import argparse
import contextlib
import copy
import os
import sys
import traceback
from collections.abc import Callable, Iterator

from ssmzoo.presets import config_dir
from ssmzoo.terminal import plain_output
from ssmzoo.threads import wait_asleep

USER_ERROR, FAILED = 2, 1


def train() -> None:
    """Entry of train.py."""
    _run("train")


def evaluate() -> None:
    """Entry of eval.py."""
    _run("eval")


def _run(config_name: str) -> None:
    wait_asleep()
    with plain_output():
        _run_plainly(config_name)


def _run_plainly(config_name: str) -> None:
    arguments = [a for a in sys.argv[1:] if a != "--traceback"]
    show_all = len(arguments) < len(sys.argv) - 1
    try:
        _hydra(config_name, arguments, show_all)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        fail(error, show_all)


def _hydra(config_name: str, arguments: list[str], show_all: bool) -> None:
    import hydra

    from ssmzoo.train import run, sweep
    from ssmzoo.train.config import free_overrides, paired_overrides, register_resolvers
    from ssmzoo.train.errors import user_errors

    register_resolvers()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors reach us instead of being printed by Hydra
    if config_name == "train":
        arguments = paired_overrides(arguments)
    sys.argv = [sys.argv[0], *user_errors(free_overrides)(arguments)]
    action: Callable = run.train if config_name == "train" else run.evaluate

    def job(cfg):
        from hydra.core.hydra_config import HydraConfig

        if HydraConfig.get().mode.name == "MULTIRUN":
            return sweep.run_job(action, cfg)
        try:
            return action(cfg)
        except Exception as error:
            fail(error, show_all)

    if all("=" in a and not a.lstrip("+~").startswith(("-", "hydra")) for a in sys.argv[1:]) and _once(
        config_name, job
    ):
        return
    main = hydra.main(config_path=str(config_dir()), config_name=config_name, version_base="1.3")(job)
    with sweep.notes() as ends:
        try:
            with one_line_usage():
                main()
        except BaseException as error:
            if not ends() or show_all:
                raise
            _end_sweep(ends(), error)
        if ends():
            _end_sweep(ends())


def _once(config_name: str, job: Callable) -> bool:
    """Run a single job as hydra.main does, which composes the configuration once more to learn whether it is one.

    False, and nothing done, where a file has other settings of Hydra than ours: a sweep, a folder, callbacks.
    """
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.core.utils import configure_log
    from hydra.types import RunMode
    from omegaconf import open_dict

    with hydra.initialize_config_dir(str(config_dir()), job_name=config_name, version_base="1.3"):
        cfg = hydra.compose(config_name, sys.argv[1:], return_hydra_config=True)
        theirs = cfg.hydra
        asked = theirs.callbacks or theirs.job.env_set or theirs.job.chdir or theirs.output_subdir
        if theirs.mode not in (None, RunMode.RUN) or theirs.run.dir != "." or asked:
            return False
        for log in (theirs.hydra_logging, theirs.job_logging):
            configure_log(log, theirs.verbose)
        theirs.mode, theirs.runtime.output_dir = RunMode.RUN, os.getcwd()
        before = HydraConfig.instance().cfg
        try:
            HydraConfig.instance().set_config(cfg)
            own = copy.deepcopy(cfg)
            with open_dict(own):
                del own["hydra"]
            job(own)
        finally:
            HydraConfig.instance().cfg = before
    return True


@contextlib.contextmanager
def one_line_usage() -> Iterator[None]:
    """Options that Hydra does not know are one message, too, and not its usage."""

    def error(parser, message: str):
        from ssmzoo.train.errors import UserError

        raise UserError(f"{message} (--help shows what there is)")

    before = argparse.ArgumentParser.error
    argparse.ArgumentParser.error = error
    try:
        yield
    finally:
        argparse.ArgumentParser.error = before


def _end_sweep(ends: list[dict], error: BaseException | None = None) -> None:
    """Say how every run ended; an error that is no run's own (the search's, the launcher's) comes after it."""
    from ssmzoo.train import sweep

    text, status = sweep.summary(ends)
    print(f"\n{text}", flush=True)
    if isinstance(error, Exception) and not status:
        fail(error)
    if status:
        sys.exit(status)


def fail(error: Exception, show_all: bool = False) -> None:
    """Print one message and leave: 2 for what the user gave, 1 for a run that failed."""
    if show_all:
        traceback.print_exception(error)
    sys.exit(_report(error))


def _report(error: Exception) -> int:
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from ssmzoo.train.config import explain_hydra_error
    from ssmzoo.train.errors import TrainingFailed, UserError

    if isinstance(error, (HydraException, OmegaConfBaseException)):
        print(f"error: {explain_hydra_error(error)}", file=sys.stderr)
        return USER_ERROR
    if isinstance(error, UserError):
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    if isinstance(error, TrainingFailed):
        print(f"error: the run failed: {error}", file=sys.stderr)
        return FAILED
    print(f"error: the run failed: {type(error).__name__}: {error} (--traceback shows where)", file=sys.stderr)
    return FAILED
