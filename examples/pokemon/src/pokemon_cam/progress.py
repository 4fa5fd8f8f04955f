"""The progress bar that every stage of a run shows."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm


def progress_bar(stage: str, total: int, unit: str) -> tqdm[Any]:
    """Create a progress bar on stderr.

    Args:
        stage: name of the stage, such as ``"reading photos"``.
        total: number of units in the stage.
        unit: name of one unit, such as ``"file"``.

    Returns:
        The bar, a context manager with ``update`` and ``set_postfix``.
    """
    # A terminal overwrites the bar, but a log file keeps every update, so it gets fewer of them.
    interval = 0.1 if sys.stderr.isatty() else 20.0
    return tqdm(total=total, desc=stage, unit=unit, mininterval=interval)
