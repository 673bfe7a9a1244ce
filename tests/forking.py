"""Runs scripts in processes that are forked with everything imported already.

A fresh interpreter spends seconds importing torch and transformers; a fork of one that has done so spends none, and is
a process of its own all the same: it can be killed, and it ends with an exit status and what it printed. Run as a
script, this file is the process that the others are forked from.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

DEADLINE = 240.0  # seconds that no process of these tests comes near on an idle machine


@dataclass(frozen=True)
class Finished:
    """How a process ended, a killed one with minus the signal's number, and what it printed."""

    returncode: int
    stdout: str
    stderr: str

    @property
    def output(self) -> str:
        return self.stdout + self.stderr

    @property
    def errors(self) -> list[str]:
        """The sentences with which the script ended."""
        return [line for line in self.stderr.replace("\r", "\n").splitlines() if line.startswith("error")]


@dataclass
class Process:
    """A script under way in a forked process."""

    pid: int
    output: Path
    server: ForkServer
    returncode: int | None = None

    @property
    def stderr(self) -> str:
        """What it has printed there so far."""
        return self.output.with_suffix(".err").read_text()

    def has_ended(self) -> bool:
        if self.returncode is None:
            self.returncode = self.server.ask({"ended": self.pid})
        return self.returncode is not None

    def wait(self) -> Finished:
        """How it ended; by a kill if it does not come to an end itself."""
        try:
            wait_until(self.has_ended, interval=0.01)
        except TimeoutError:
            self.kill()
            wait_until(self.has_ended)
        return Finished(self.returncode, *(self.output.with_suffix(end).read_text() for end in (".out", ".err")))

    def kill(self, number: int = signal.SIGKILL) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)


class ForkServer:
    """Starts scripts by forking; several threads may ask it at once.

    Args:
        folder: where the processes' output is kept, and the home of those that are given no other.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        private = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        self.environment = {**private, **threads, "HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1"}
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=self.environment
        )

    def ask(self, request: dict[str, Any]) -> Any:
        with self._lock:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            return json.loads(self._process.stdout.readline())

    def start(
        self,
        main: Callable[[], None],
        arguments: Sequence[object],
        *,
        sabotage: Sequence[object] = (),
        environment: Mapping[str, str] | None = None,
    ) -> Process:
        """Starts a script.

        Args:
            main: its main function, which the process imports by name.
            arguments: its command line.
            sabotage: a function of `sabotage.py`, by name, and its arguments, called before the script begins.
            environment: all of its variables; those of the server if left out.
        """
        output = self.folder / f"process-{next(self._numbers)}"
        for end in (".out", ".err"):
            output.with_suffix(end).touch()
        request = {
            "main": [main.__module__, main.__name__],
            "arguments": list(map(str, arguments)),
            "sabotage": list(map(str, sabotage)),
            "environment": dict(self.environment if environment is None else environment),
            "output": str(output),
        }
        return Process(self.ask(request), output, self)

    def start_processes(
        self, count: int, main: Callable[[], None], arguments: Sequence[object], *, sabotage: Sequence[object] = ()
    ) -> list[Process]:
        """Starts one script in several processes, which know each other as `torchrun` would tell them."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        shared = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        places = ({**shared, "RANK": rank, "LOCAL_RANK": rank} for rank in range(count))
        environments = (self.environment | {name: str(value) for name, value in place.items()} for place in places)
        return [self.start(main, arguments, sabotage=sabotage, environment=each) for each in environments]

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


def wait_until(condition: Callable[[], object], seconds: float = DEADLINE, interval: float = 0.002) -> None:
    """Returns when the condition holds, and raises TimeoutError if it does not come to."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("the condition has not come true")
        time.sleep(interval)


def serve() -> None:
    """Forks a process for every request to start one, and tells of one how it has ended, or null."""
    import publishing  # noqa: F401  (imports the scripts, once for all processes)
    import torch
    from tqdm import tqdm

    from bilinear_tc.train import fit  # noqa: F401
    from bilinear_tc.train.base import Base

    # tqdm's own lock is one semaphore for all forks, which a process that is killed as it prints holds for ever
    tqdm.monitor_interval = 0
    tqdm.set_lock(threading.RLock())
    torch.set_num_threads(1)  # threads of a forked parent are gone, and a pool of them waits for ever
    Base.load("train/quickstart")  # which imports what transformers leaves for later
    gc.freeze()  # what is here now is nothing that the processes need to look through
    requests, replies = sys.stdin, os.fdopen(os.dup(1), "w")
    for line in iter(requests.readline, ""):
        request = json.loads(line)
        if "ended" in request:
            pid, status = os.waitpid(request["ended"], os.WNOHANG)
            reply = os.waitstatus_to_exitcode(status) if pid else None
        else:
            reply = os.fork()
            if not reply:
                begin(request)
        print(json.dumps(reply), file=replies, flush=True)


def begin(request: dict[str, Any]) -> NoReturn:
    """A forked process's life: the script, with its output in files."""
    import sabotage

    from bilinear_tc.train.errors import command_line

    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for descriptor, end in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(request["output"] + end, os.O_WRONLY), descriptor)
    sys.stdout.reconfigure(line_buffering=True)
    os.environ.clear()
    os.environ.update(request["environment"])
    heed_environment()
    if hasattr(os, "sched_setaffinity"):  # one thread: more would only wait for each other on layers this small
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[os.getpid() % len(cores)]})
    if request["sabotage"]:
        name, *arguments = request["sabotage"]
        getattr(sabotage, name)(*arguments)
    module, main = request["main"]
    sys.argv = [module, *request["arguments"]]
    status: Any = 0
    try:
        command_line(getattr(import_module(module), main))
    except SystemExit as ended:
        status = ended.code
    # what an interpreter does at its end, but for clearing every module, which takes half a second
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status or 0)


def heed_environment() -> None:
    """Sets what huggingface_hub and transformers take from the environment when they are imported."""
    import datasets
    from huggingface_hub import constants, hf_api
    from transformers import dynamic_module_utils

    constants.ENDPOINT = os.environ.get("HF_ENDPOINT", constants.ENDPOINT)
    constants.HUGGINGFACE_CO_URL_TEMPLATE = constants.ENDPOINT + "/{repo_id}/resolve/{revision}/{filename}"
    constants.HF_HUB_OFFLINE = os.environ.get("HF_HUB_OFFLINE") == "1"
    constants.HF_HUB_DISABLE_XET = os.environ.get("HF_HUB_DISABLE_XET") == "1"
    constants.HF_HOME = os.environ["HF_HOME"]
    datasets.config.HF_DATASETS_CACHE = Path(os.environ["HF_HOME"]) / "datasets"
    constants.HF_HUB_CACHE = str(Path(os.environ["HF_HOME"]) / "hub")
    hf_api.api.endpoint = constants.ENDPOINT
    dynamic_module_utils.HF_MODULES_CACHE = str(Path(os.environ["HF_HOME"]) / "modules")


if __name__ == "__main__":
    serve()
