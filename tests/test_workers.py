"""The workers of `pytest -n` share out the cores, and what they start computes on its worker's alone."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import own_cores, pytest_configure


@pytest.mark.parametrize(("count", "workers"), [(2, 2), (3, 2), (16, 2), (8, 4), (4, 3)])
def test_every_core_is_one_workers(count: int, workers: int) -> None:
    cores = list(range(10, 10 + count))
    shares = [own_cores(cores, f"gw{number}", workers) for number in range(workers)]
    assert all(shares)
    assert sorted(core for share in shares for core in share) == cores


def test_a_worker_beyond_the_cores_has_one_that_another_has() -> None:
    assert [own_cores([5, 7], f"gw{number}", 3) for number in range(3)] == [[5], [7], [5]]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system pins no process to cores")
def test_a_worker_and_what_it_starts_have_a_thread_for_each_of_their_cores() -> None:
    cores = os.sched_getaffinity(0)
    try:
        pytest_configure(SimpleNamespace(workerinput={"workerid": "gw1", "workercount": 2}))  # type: ignore[arg-type]
        own = os.sched_getaffinity(0)
        assert len(own) == max(1, len(cores) // 2)
        assert torch.get_num_threads() == len(own)
        child = [sys.executable, "-c", "import os; print(sorted(os.sched_getaffinity(0)))"]
        assert subprocess.check_output(child, text=True).strip() == str(sorted(own))
    finally:
        os.sched_setaffinity(0, cores)
