"""What can befall a fit, done to the process from within before the fit begins."""

from __future__ import annotations

import os
import resource
import signal
import sys
import threading
import time


def die_at(event: str, path_part: str, delay: str = "0") -> None:
    """SIGKILL, `delay` seconds after Python is about to do something to a file: an audit event such as "os.rename"."""

    def hook(name: str, arguments: tuple) -> None:
        if name == event and path_part in str(arguments[0]):
            threading.Thread(target=die, daemon=True).start() if float(delay) else die()

    def die() -> None:
        time.sleep(float(delay))
        os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def fill_disk_at(path_part: str, size: str) -> None:
    """From the first opening of such a file on, no file can grow beyond `size` bytes."""

    def hook(name: str, arguments: tuple) -> None:
        if name == "open" and path_part in str(arguments[0]):
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(size), int(size)))

    sys.addaudithook(hook)


def choose_micro_batches_of(sequences: str) -> None:
    """As if the free memory of a GPU were such that a fit chooses micro-batches of this size."""
    from bilinear_tc.train.fitting import fitter

    fitter.choose_micro_batch_size = lambda *_: int(sequences)


def hide_package(name: str) -> None:
    """As if the package were not installed."""
    sys.modules[name] = None


def make_a_mistake() -> None:
    """As if the code of a step were wrong."""
    from bilinear_tc.train.fitting.fitter import Fitter

    def step(*_arguments: object) -> None:
        {}["no such key"]

    Fitter.step = step  # type: ignore[method-assign]


def count_passes() -> None:
    """Every pass of a base, but for the short one that finds its MLPs, prints a line."""
    from bilinear_tc.train.base import Base

    forward_pass = Base.forward_pass

    def counted(self, *arguments):
        print("a pass of the base")
        return forward_pass(self, *arguments)

    Base.forward_pass = counted


def small_disk() -> None:
    """As if the disk had next to no room."""
    import shutil

    shutil.disk_usage = lambda _path: shutil._ntuple_diskusage(10**6, 10**6 - 1000, 1000)
