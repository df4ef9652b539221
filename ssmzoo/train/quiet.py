"""Lightning's hints about workers, devices and tips are not for the users of this loop."""

from __future__ import annotations

import logging
import warnings


def quiet() -> None:
    for name in ("lightning.pytorch", "lightning.fabric", "lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning.*")
    warnings.filterwarnings("ignore", message=".*num_workers.*")
