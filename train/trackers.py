"""Experiment trackers: checked before the work begins, fed a step at a time, closed however the fit ends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers

PROJECT = "bilinear-tc"


def check_tracker(name: str) -> None:
    """Raises ValueError where a tracker's package is missing, which Accelerate passes over in silence."""
    if name != "none" and name not in [str(tracker) for tracker in get_available_trackers()]:
        raise ValueError(
            f"report_to is {name}, but the package {name} is not installed: install it (pip install {name}), or leave "
            "--report_to out"
        )


@contextmanager
def tracked(accelerator: Accelerator, config: dict[str, Any]) -> Iterator[None]:
    """While the context lasts, `accelerator.log` reaches the trackers; what they hold back is written at its end."""
    accelerator.init_trackers(PROJECT, config=config)
    try:
        yield
    finally:
        for tracker in accelerator.trackers:
            tracker.finish()
