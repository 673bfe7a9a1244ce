"""How every entry script starts, and how it ends: quietly, or with one sentence and a non-zero exit status."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
import transformers
from accelerate import Accelerator


def start_accelerator(**settings: Any) -> Accelerator:
    """The script's Accelerator, with this process's share of the cores where it computes on the CPU."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    transformers.utils.logging.disable_progress_bar()
    accelerator = Accelerator(**settings)
    if accelerator.device.type == "cpu":
        # `accelerate launch` leaves every process a single thread unless told otherwise
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    return accelerator


def command_line(main: Callable[[], None]) -> None:
    """Runs a script's main function; an expected error becomes one sentence on stderr and exit status 1.

    Set BILINEAR_TC_TRACEBACK=1 to see where it came from.
    """
    try:
        main()
    except (ValueError, OSError, RuntimeError, ArithmeticError) as error:
        if os.environ.get("BILINEAR_TC_TRACEBACK"):
            raise
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(1)
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr, flush=True)
        sys.exit(130)
