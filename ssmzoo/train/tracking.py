"""TensorBoard and Weights & Biases beside metrics.csv."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlparse

from ssmzoo.terminal import Printable

MODES = ("online", "offline", "disabled", "shared")


def wandb_logger(
    run_dir: Path,
    project: str,
    name: str,
    mode: str | None = None,
    entity: str | None = None,
    group: str | None = None,
    tags: list[str] | None = None,
):
    """Lightning's WandbLogger. Mode and server are wandb's own affair (WANDB_MODE, WANDB_BASE_URL, `wandb login`), but
    that without a key a run is kept offline instead of waiting for a login.

    group, tags  of the run in wandb's tables: a sweep's name; model, data and task
    """
    if mode is not None and mode not in MODES:
        raise ValueError(f"logger.mode is {mode!r}; choose one of {', '.join(MODES)} or leave it out")
    try:
        import wandb
    except ImportError:
        raise ValueError("logger=wandb needs the package wandb: pip install wandb") from None
    from lightning.pytorch.loggers import WandbLogger

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, Printable):
            stream.colours = True  # wandb's lines, until this command ends
    settings = wandb.setup().settings
    if mode is None and settings.mode == "online" and not _has_key(settings):
        mode = "offline"
        print(
            f"wandb: no key for {settings.base_url}; the run is kept offline, upload it later with "
            f"`wandb sync {run_dir}/wandb/offline-run-*`"
        )
    identity = Path(run_dir) / "wandb_id.txt"
    if not identity.exists():
        identity.write_text(os.urandom(6).hex())
    return WandbLogger(
        project=project,
        name=name,
        entity=entity,
        group=group,
        tags=tags,
        save_dir=str(run_dir),
        id=identity.read_text().strip(),
        resume="allow",
        log_model=False,
        **({} if mode is None else {"mode": mode}),
    )


def _has_key(settings) -> bool:
    """In the environment, or noted by `wandb login` for the server in use."""
    if os.environ.get("WANDB_API_KEY") or settings.api_key:
        return True
    import netrc

    try:
        return netrc.netrc().authenticators(urlparse(settings.base_url).hostname or "") is not None
    except (OSError, netrc.NetrcParseError):
        return False


@contextlib.contextmanager
def ending_wandb() -> Iterator[None]:
    """End wandb's run with the block: the next run of a sweep in this process would go on in it."""
    status = 1
    try:
        yield
        status = 0
    finally:
        wandb = sys.modules.get("wandb")
        if wandb is not None and getattr(wandb, "run", None) is not None:
            wandb.finish(exit_code=status)


def tensorboard_logger(run_dir: Path, after: int | None = None):
    """Lightning's TensorBoardLogger, writing into <run>/tensorboard; what was logged beyond step `after` is hidden."""
    from lightning.pytorch.loggers import TensorBoardLogger

    hidden = {} if after is None else {"purge_step": after + 1}
    try:
        return TensorBoardLogger(save_dir=str(run_dir), name="tensorboard", version="", **hidden)
    except ModuleNotFoundError:
        raise ValueError("logger=tensorboard needs the package tensorboard: pip install tensorboard") from None
