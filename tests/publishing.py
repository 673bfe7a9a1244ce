"""Runs the publish command against a loopback Hub, in processes that are forked with everything imported already.

A fresh interpreter spends seconds importing torch and transformers; a fork of one that has done so spends none, and
is a process of its own all the same: it has its own output, and it can be killed.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from hub_server import HubServer
from huggingface_hub import constants
from transformers import dynamic_module_utils

from bilinear_tc.train.errors import command_line
from bilinear_tc.train.run import Run
from bilinear_tc.upload import publish
from bilinear_tc.upload.hub import HubRepository
from bilinear_tc.upload.repository import list_files


@dataclass(frozen=True)
class Finished:
    """How a process ended, and what it printed."""

    returncode: int
    stdout: str
    stderr: str

    @property
    def output(self) -> str:
        return self.stdout + self.stderr


class Publisher:
    """Publishes to one loopback Hub from processes whose HF_HOME is `home`; `variables` join their environment."""

    _context = multiprocessing.get_context("forkserver")

    def __init__(self, hub: HubServer, home: Path, token: str | None = None, **variables: str) -> None:
        self.hub, self.home, self.token = hub, home, hub.token if token is None else token
        self.variables = variables
        self.home.mkdir(parents=True, exist_ok=True)
        self._runs = 0

    def command(self, run: Path, *flags: str) -> Finished:
        """`python upload/publish.py RUN flags`."""
        return self.finish(self.start(main, [str(run), *flags]))

    def send(self, run: Path, settings: publish.Publication) -> Finished:
        """The part of the command that talks to the Hub, with RUN/repository as it is and short pauses."""
        return self.finish(self.start(send, run, settings))

    def start(self, target: Callable[..., None], *arguments: Any) -> BaseProcess:
        """Starts a process that runs a function of this module as a script would."""
        self._runs += 1
        out = self.home / f"run-{self._runs}"
        environment = self.hub.environment(self.home, token=self.token) | self.variables
        process = self._context.Process(target=_begin, args=(environment, out, target, arguments))
        process.out = out
        process.start()
        return process

    @staticmethod
    def finish(process: BaseProcess) -> Finished:
        process.join(timeout=240)
        if process.exitcode is None:
            process.kill()
            process.join()
        texts = [process.out.with_suffix(end) for end in (".out", ".err")]
        return Finished(process.exitcode, *(path.read_text() if path.exists() else "" for path in texts))


def start_forkserver(home: Path) -> None:
    """Imports everything once, in the process that the others are forked from, with `home` as its HF_HOME."""
    before = dict(os.environ)
    try:
        path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
        os.environ.update(HF_HOME=str(home), OMP_NUM_THREADS="1", PYTHONPATH=path)
        Publisher._context.set_forkserver_preload(["publishing"])
        warm_up = Publisher._context.Process(target=str)
        warm_up.start()
        warm_up.join()
    finally:
        os.environ.clear()
        os.environ.update(before)


def main(arguments: Sequence[str]) -> None:
    """The command."""
    sys.argv = ["publish.py", *arguments]
    publish.main()


def send(run: Path, settings: publish.Publication) -> None:
    """All that the command asks of the Hub, from when it has built the folder."""
    hub = HubRepository(settings.repo_id, settings.revision, first_wait=0.02)
    hub.check_token()
    publish.send(hub, settings, Run(run), list_files(run / publish.FOLDER))


def _begin(environment: dict[str, str], out: Path, target: Callable[..., None], arguments: Sequence[Any]) -> None:
    for descriptor, end in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(out.with_suffix(end), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115  (lives as long as the process)
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    os.environ.clear()
    os.environ.update(environment)
    # what importing huggingface_hub and transformers in this environment sets
    constants.ENDPOINT = environment["HF_ENDPOINT"]
    constants.HF_HUB_OFFLINE = environment.get("HF_HUB_OFFLINE") == "1"
    constants.HUGGINGFACE_CO_URL_TEMPLATE = constants.ENDPOINT + "/{repo_id}/resolve/{revision}/{filename}"
    dynamic_module_utils.HF_MODULES_CACHE = str(Path(environment["HF_HOME"]) / "modules")
    command_line(lambda: target(*arguments))
