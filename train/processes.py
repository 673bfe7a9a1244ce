"""The processes of a launch: started if Accelerate has not, acting as one, and stopping together."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import psutil
import torch
import torch.distributed as dist
import transformers
from accelerate import Accelerator
from accelerate.utils import parse_flag_from_env
from torch import Tensor

from bilinear_tc.train.errors import ElsewhereError
from bilinear_tc.train.launchers import alive, launchers

logger = logging.getLogger(__name__)

T = TypeVar("T")


def start_accelerator(**settings: Any) -> Accelerator:
    """The script's Accelerator; on the CPU, with all processes asked for, each with its share of the cores."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    transformers.utils.logging.disable_progress_bar()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C, which cleans up
    launchers()  # as long as they are there
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.cuda.is_available()
    if on_cpu:
        start_missing_processes()
    # without `cpu`, processes that find no GPU would each take themselves for the only one, and a Mac's own device,
    # which has no float64, would be taken
    accelerator = Accelerator(cpu=on_cpu, **settings)
    if accelerator.mixed_precision != "no":
        logger.warning("accelerate's mixed_precision is not used: products are computed in the type that --dtype names")
    if accelerator.device.type == "cpu" and os.environ.get("OMP_NUM_THREADS", "1") == "1" and not threads_chosen():
        torch.set_num_threads(max(1, available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    return accelerator


def threads_chosen() -> bool:
    """Whether it is the user who set OMP_NUM_THREADS: launchers give every process a single thread if nobody did."""
    try:
        return "OMP_NUM_THREADS" in (launchers()[-1].environ() if launchers() else os.environ)
    except psutil.Error:
        return False


def available_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_alone = False


@contextmanager
def alone() -> Iterator[None]:
    """While the context lasts, this process takes itself for the only one: it holds all rows of what it works on."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def process_count() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() and not _alone else 1


def process_index() -> int:
    return dist.get_rank() if process_count() > 1 else 0


def is_main() -> bool:
    """Whether this is the process that reads text and prints, even while it is `alone`."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


def sum_over_processes(tensor: Tensor) -> Tensor:
    """The sum of a tensor over all processes, which must ask together; the tensor itself if there is one process."""
    if process_count() == 1:
        return tensor
    total = tensor.clone()
    dist.all_reduce(total)
    return total


def counts_over_processes(count: int, device: torch.device) -> list[int]:
    """What each process counts, in their order; they must ask together. One process alone waits for no device."""
    if process_count() == 1:
        return [count]
    counts = torch.zeros(process_count(), dtype=torch.long, device=device)
    counts[process_index()] = count
    return sum_over_processes(counts).tolist()


def gather_over_processes(rows: Tensor) -> Tensor:
    """The rows (first axis) of all processes, which must ask together, in the order of the processes."""
    if process_count() == 1:
        return rows
    counts = counts_over_processes(len(rows), rows.device)
    first = sum(counts[: process_index()])
    everything = rows.new_zeros(sum(counts), *rows.shape[1:])
    everything[first : first + len(rows)] = rows
    return sum_over_processes(everything)


def on_main(work: Callable[[], T]) -> T:
    """Does some work on the main process while the others wait; its result, a small one, is returned on all.

    ElsewhereError on the other processes, if the work raised an error on the main one, which raises that.
    """
    return on_all(lambda: cast(T, work() if is_main() else None))[0]


def on_all(work: Callable[[], T]) -> list[T]:
    """Does some work on every process; their results, small ones, in the processes' order.

    If it raises an error on some, the first of them raises it, and the others ElsewhereError.
    """
    if process_count() == 1:
        return [work()]
    outcome: tuple[bool, Any] = False, None
    try:
        outcome = True, work()
    except Exception as error:
        failure = error
    outcomes: list[Any] = [None] * process_count()
    dist.all_gather_object(outcomes, outcome)
    done, results = zip(*outcomes, strict=True)
    if not all(done):
        raise failure if done.index(False) == process_index() else ElsewhereError("another process has failed")
    return list(results)


class StopRequest:
    """Notices SIGTERM, SIGINT and SIGHUP while the context lasts: a step ends and is saved before the process does.

    So it does if a launcher has ended: `accelerate launch` leaves its script alone when it gets a SIGTERM.

    Args:
        device: where processes exchange tensors.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._received = False

    def __enter__(self) -> StopRequest:
        asked = {getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)}
        self._before = {number: signal.signal(number, self._note) for number in asked}
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        # A launcher that has lost one process tells the others to end: one that is ending already says why first.
        if error_type is None:
            for number, handler in self._before.items():
                signal.signal(number, handler)

    def _note(self, _number: int, _frame: object) -> None:
        self._received = True

    def __bool__(self) -> bool:
        """Whether any process has been asked to stop: the same answer on all of them, which must ask together."""
        asked = self._received or not all(map(alive, launchers()))
        return bool(sum_over_processes(torch.tensor(float(asked), device=self._device)).item())


def start_missing_processes() -> None:
    """If `accelerate launch --num_processes N` has started one process on the CPU, becomes the N asked for.

    Accelerate leaves several CPU processes to mpirun; given no host file for it, it starts one and says nothing.
    """
    wanted = _processes_asked_for() if _launched_alone() else 1
    if wanted > 1:
        sys.stdout.flush()
        launcher = ["torch.distributed.run", "--standalone", f"--nproc_per_node={wanted}"]
        os.execv(sys.executable, [sys.executable, "-m", *launcher, *sys.argv])


def _launched_alone() -> bool:
    """Whether Accelerate has meant several processes and nothing tells which of them this is."""
    meant = {"ACCELERATE_MIXED_PRECISION", "MASTER_PORT"} <= os.environ.keys()
    ranks = {"RANK", "LOCAL_RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK"}
    return meant and not ranks & os.environ.keys()


def _processes_asked_for() -> int:
    """`--num_processes` of the `accelerate launch` that started this process, or of Accelerate's configuration."""
    from accelerate.commands.config.config_args import default_config_file, load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    parent = psutil.Process().parent()
    words = parent.cmdline() if parent else []
    names = ("launch", "accelerate-launch", "accelerate.commands.launch")
    start = next((i for i, word in enumerate(words) if os.path.basename(word) in names), len(words))
    if start == len(words):
        return 1
    asked = launch_command_parser().parse_args(words[start + 1 :])
    if asked.num_processes is None and (asked.config_file or os.path.isfile(default_config_file)):
        asked = load_config_from_file(asked.config_file)
    one_machine = (asked.num_machines or 1) == 1  # several are started by mpirun or not at all
    return asked.num_processes if asked.num_processes and one_machine else 1
