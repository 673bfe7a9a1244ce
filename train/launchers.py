"""The launchers above this process, such as `accelerate launch`: whether they still run, and who has the last word."""

from __future__ import annotations

import os
import sys
import time
from functools import cache

import psutil

NAMES = {"accelerate", "accelerate-launch", "accelerate.commands.launch", "torchrun", "torch.distributed.run"}
PATIENCE = 30.0  # seconds that a launcher may take to end after its script


@cache
def launchers() -> tuple[psutil.Process, ...]:
    """The launchers that started this process, the innermost first."""
    above: list[psutil.Process] = []
    try:
        parent = psutil.Process().parent()
        while parent and any(os.path.basename(word) in NAMES for word in parent.cmdline()):
            above.append(parent)
            parent = parent.parent()
    except psutil.Error:  # another user's process, or one that has ended
        pass
    return tuple(above)


def alive(process: psutil.Process) -> bool:
    """Whether a process runs still, and not as a zombie."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def say_last(sentence: str) -> None:
    """Prints a sentence to stderr and, since launchers print a long report if a script fails, again below that."""
    print(sentence, file=sys.stderr, flush=True)
    above = launchers()
    if above and hasattr(os, "fork") and os.fork() == 0:
        os.setsid()  # a launcher that ends its processes leaves this one
        deadline = time.monotonic() + PATIENCE
        while any(map(alive, above)) and time.monotonic() < deadline:
            time.sleep(0.02)
        os.write(2, f"{sentence}\n".encode())
        os._exit(0)
