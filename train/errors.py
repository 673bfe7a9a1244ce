"""Errors whose sentence is for the user, and how a script ends on them: without a traceback, which is left to bugs."""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Callable

import torch
from huggingface_hub import constants

from bilinear_tc.train.launchers import say_last

REPORT = "https://github.com/bilinear-tc/bilinear-tc/issues"  # pyproject.toml's Issues
# what torch.distributed's transports say if the other end is gone
LOST_PROCESS = re.compile(r"gloo|NCCL|Connection (closed|reset|refused)|Broken pipe|Socket Timeout", re.IGNORECASE)


class UserError(ValueError):
    """Something that the user can mend. Its message is one sentence: what was expected, what came, what to do."""


class StorageError(UserError, OSError):
    """A file or folder that cannot be written."""


class NotFiniteError(UserError, FloatingPointError):
    """A NaN or an infinity, in the base's activations or in a transcoder that has diverged."""


class Interrupted(UserError):
    """The process was asked to stop, and what it did so far is saved."""


class ElsewhereError(RuntimeError):
    """A process stops because another one has failed, which says itself why."""


def one_line(error: BaseException, most: int = 400) -> str:
    """A library's message as part of a sentence: on one line, cut short, the type's name where it says nothing."""
    message = " ".join(str(error).split()).rstrip(".")
    message = f"unknown {message}" if isinstance(error, KeyError) else message  # which says nothing but the key
    return (message if len(message) <= most else f"{message[:most]} …") or type(error).__name__


def command_line(main: Callable[[], None]) -> None:
    """Runs a script's main function.

    A `UserError` becomes one sentence on stderr and exit status 1; anything else keeps its traceback, with a last line
    that says that it is a bug. Set BILINEAR_TC_TRACEBACK=1 to see where a `UserError` came from.
    """
    process = int(os.environ.get("RANK", "0"))
    prefix = f"error (process {process}):" if process else "error:"
    try:
        main()
    except ElsewhereError:
        sys.exit(1)
    except KeyboardInterrupt:
        print(prefix, "interrupted", file=sys.stderr, flush=True)
        sys.exit(130)
    except Exception as error:
        sentence = expected(error)
        if sentence is None or os.environ.get("BILINEAR_TC_TRACEBACK"):
            traceback.print_exc()
        if sentence is None:
            sentence = f"this is a bug in bilinear-tc: please report it, with the lines above, at {REPORT}"
        say_last(f"{prefix} {sentence}")
        sys.exit(1)


def expected(error: BaseException) -> str | None:
    """What to tell the user of an error that is not a bug; None if it is one."""
    step: BaseException | None = error
    while step is not None:
        if isinstance(step, OSError) and str(step.filename).startswith(constants.HF_HOME):
            return (
                f"the cache {constants.HF_HOME} cannot be used ({one_line(step)}): set HF_HOME to a folder of your own"
            )
        step = step.__cause__ or step.__context__
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return f"the device's memory is full ({one_line(error, 200)}): lower --micro_batch_size"
    if torch.distributed.is_initialized() and isinstance(error, RuntimeError) and LOST_PROCESS.search(str(error)):
        return (
            "another process of this launch has ended or cannot be reached (its own error, if it had time for one, is "
            "above); what was last saved is whole: run the same command to resume"
        )
    return None
