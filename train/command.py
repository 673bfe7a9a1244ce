"""How every entry script starts, and how it ends: quietly, or with one sentence and a non-zero exit status."""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
from collections.abc import Callable
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import parse_flag_from_env
from safetensors import SafetensorError

from bilinear_tc.train.processes import ElsewhereError, start_missing_processes

EXPECTED = (ValueError, OSError, RuntimeError, ArithmeticError, SafetensorError)
# what torch.distributed's transports say when the other end is gone
LOST_PROCESS = re.compile(r"gloo|NCCL|Connection (closed|reset|refused)|Broken pipe|Socket Timeout", re.IGNORECASE)


def start_accelerator(**settings: Any) -> Accelerator:
    """The script's Accelerator; on the CPU, with all processes asked for, each with its share of the cores."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    transformers.utils.logging.disable_progress_bar()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C, which cleans up
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.cuda.is_available()
    if on_cpu:
        start_missing_processes()
    # without `cpu`, processes that find no GPU would each take themselves for the only one, and a Mac's own device,
    # which has no float64, would be taken
    accelerator = Accelerator(cpu=on_cpu, **settings)
    # `accelerate launch` gives every process a single thread unless told otherwise
    if accelerator.device.type == "cpu" and os.environ.get("OMP_NUM_THREADS", "1") == "1":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    return accelerator


def command_line(main: Callable[[], None]) -> None:
    """Runs a script's main function; an expected error becomes one sentence on stderr and exit status 1.

    Set BILINEAR_TC_TRACEBACK=1 to see where it came from.
    """
    process = int(os.environ.get("RANK", "0"))
    prefix = f"error (process {process}):" if process else "error:"
    try:
        main()
    except ElsewhereError:
        sys.exit(1)
    except EXPECTED as error:
        if os.environ.get("BILINEAR_TC_TRACEBACK"):
            raise
        print(prefix, sentence(error), file=sys.stderr, flush=True)
        sys.exit(1)
    except KeyboardInterrupt:
        print(prefix, "interrupted", file=sys.stderr, flush=True)
        sys.exit(130)


def sentence(error: BaseException) -> str:
    """What an error says, in one line; torch's reports of lost processes and of full memory in plain words."""
    message = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return f"the device's memory is full ({message[:200]}): lower --micro_batch_size"
    if torch.distributed.is_initialized() and isinstance(error, RuntimeError) and LOST_PROCESS.search(message):
        return (
            "another process of this launch has ended or cannot be reached (its own error, if it had time for one, is "
            "above); what was last saved is whole: run the same command to go on"
        )
    return message
