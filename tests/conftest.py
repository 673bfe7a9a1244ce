"""What several test files start from: small decoders with random weights, and tiny fits.

With `-n`, each worker runs whole files on cores of its own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from bases import tiny_llama, tiny_neox, write_base
from fitting import TinyFit, write_text
from forking import ForkServer
from hub_server import HubServer
from publishing import Publisher

from bilinear_tc.train.base import Base


def pytest_configure(config: pytest.Config) -> None:
    """Threads of two workers on one core would wait for each other; what a worker starts stays on its cores."""
    worker = getattr(config, "workerinput", None)
    if worker and hasattr(os, "sched_setaffinity"):
        cores = own_cores(sorted(os.sched_getaffinity(0)), worker["workerid"], worker["workercount"])
        os.sched_setaffinity(0, cores)
        torch.set_num_threads(len(cores))


def own_cores(cores: list[int], worker: str, workers: int) -> list[int]:
    """Every `workers`-th of the cores from the worker's number on ("gw0" is its name); one if there are too few."""
    return cores[int(worker.removeprefix("gw")) % len(cores) :: workers]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest file comes first, so that the other workers do the rest meanwhile."""
    items.sort(key=lambda item: item.path.stem != "test_quickstart")


@pytest.fixture(autouse=True)
def _same_threads() -> Iterator[None]:
    """A script that a test calls in this process may set their number, on which the last bits of later tests depend."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubServer]:
    with HubServer(tmp_path / "hub") as server:
        yield server
        assert not server.leaks, "a token went to the storage host"


@pytest.fixture
def publisher(fork_server: ForkServer, hub: HubServer, tmp_path: Path) -> Publisher:
    return Publisher(fork_server, hub, tmp_path / "home")


@pytest.fixture
def neox() -> Base:
    """Three layers of width 16, two-matrix MLPs of width 64 whose pre-activations vary by about one."""
    return Base(tiny_neox(), tokenizer=None)


@pytest.fixture
def llama() -> Base:
    """Two layers of width 16 with gated MLPs of width 40."""
    return Base(tiny_llama(num_hidden_layers=2), tokenizer=None)


@pytest.fixture(scope="session")
def fork_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    """Starts scripts by forking a process that has imported everything."""
    server = ForkServer(tmp_path_factory.mktemp("processes"))
    yield server
    server.close()


@pytest.fixture(scope="session")
def tiny_fit(fork_server: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> TinyFit:
    """A fit of a tiny base on local text that takes seconds."""
    folder = tmp_path_factory.mktemp("tiny")
    write_text(folder / "text")
    return TinyFit(fork_server, write_base(folder / "base"), folder / "text", folder)
