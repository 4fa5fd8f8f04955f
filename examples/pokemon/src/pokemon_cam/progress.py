"""One progress bar per stage of a run."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm


def progress_bar(stage: str, total: int, unit: str) -> tqdm[Any]:
    """A progress bar on stderr.

    Args:
        stage: what is being done.
        total: number of units.
        unit: what is counted, in the singular.

    Returns:
        The bar: a context manager with ``update`` and ``set_postfix``.
    """
    # A log keeps every state of a bar, so there it changes seldom.
    interval = 0.1 if sys.stderr.isatty() else 20.0
    return tqdm(total=total, desc=stage, unit=unit, mininterval=interval)
