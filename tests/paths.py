"""Where tests find the checkout and what it ships."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"
NOTEBOOKS = ROOT / "notebooks"
CHECKPOINTS = NOTEBOOKS / "checkpoints"
