"""Several processes fit what one fits, whatever starts them, and none waits for one that has gone."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from fitting import TinyFit, assert_loads, assert_same_layers, checkpoints, layers, partial
from forking import DEADLINE, Finished, wait_until
from safetensors.torch import load
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

REPOSITORY = Path(__file__).resolve().parent.parent
LOST = (
    "another process of this launch has ended or cannot be reached (its own error, if it had time for one, is above); "
    "what was last saved is whole: run the same command to resume"
)

pytestmark = pytest.mark.slow


def run_processes(
    tiny_fit: TinyFit, count: int, run: Path, *flags: object, sabotage: Sequence[object] = ()
) -> list[Finished]:
    return [fit.wait() for fit in tiny_fit.start_processes(count, run, *flags, sabotage=sabotage)]


def assert_close_layers(run: Path, reference: Path) -> None:
    """Weights and histories are the same up to rounding."""
    ours, theirs = layers(run), layers(reference)
    assert ours.keys() == theirs.keys()
    for name, (weights, history) in ours.items():
        tensors, expected = load(weights), load(theirs[name][0])
        for key, tensor in tensors.items():
            torch.testing.assert_close(tensor, expected[key], rtol=1e-3, atol=1e-4)
        assert history["tokens"] == theirs[name][1]["tokens"]
        assert history["fvu"].to_pylist() == pytest.approx(theirs[name][1]["fvu"].to_pylist(), rel=1e-4)


@pytest.mark.parametrize(("count", "packing"), [(2, "--no_pack"), (3, "--pack"), (3, "--no_pack")])
def test_the_same_global_batch_gives_the_same_curve(
    tiny_fit: TinyFit, tmp_path: Path, count: int, packing: str
) -> None:
    """22 sequences a batch do not divide by 3."""
    settings, run = ("--max_steps", 8, packing), tmp_path / "run"
    for finished in run_processes(tiny_fit, count, run, *settings):
        assert finished.returncode == 0, finished.stderr
    assert yaml.safe_load((run / "layer_0" / "config.yaml").read_text())["fit"]["processes"] == count
    assert_close_layers(run, tiny_fit.reference(*settings))


@pytest.fixture(scope="module")
def undisturbed(tiny_fit: TinyFit, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of two processes that nothing befell."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    assert [finished.returncode for finished in run_processes(tiny_fit, 2, run)] == [0, 0]
    return run


@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_process_ends_the_others_and_the_run_goes_on(
    tiny_fit: TinyFit, undisturbed: Path, tmp_path: Path, lost: int
) -> None:
    run = tmp_path / "run"
    fits = tiny_fit.start_processes(2, run)
    wait_until(lambda: checkpoints(run)[-1:] > [4])
    fits[lost].kill()
    survivor = fits[1 - lost].wait()
    assert fits[lost].wait().returncode == -signal.SIGKILL
    assert survivor.returncode == 1
    assert survivor.errors == [f"error: {LOST}" if lost else f"error (process 1): {LOST}"]
    assert_loads(run)
    last = checkpoints(run)[-1]

    resumed = run_processes(tiny_fit, 2, run)
    assert [finished.returncode for finished in resumed] == [0, 0]
    assert f"resuming {run} after step {last} of 24" in resumed[0].stdout
    assert partial(run) == []
    assert_same_layers(run, undisturbed)


def test_asking_one_process_to_stop_stops_all_and_one_can_go_on(tiny_fit: TinyFit, tmp_path: Path) -> None:
    run = tmp_path / "run"
    fits = tiny_fit.start_processes(2, run)
    wait_until(lambda: checkpoints(run)[-1:] > [0])
    fits[1].kill(signal.SIGTERM)
    stopped = [fit.wait() for fit in fits]
    last = checkpoints(run)[-1]
    assert [finished.returncode for finished in stopped] == [1, 1]
    assert stopped[0].errors[0].startswith(f"error: stopped after step {last} of 24, which is saved in {run}")
    assert tiny_fit.run(run).returncode == 0
    assert_close_layers(run, tiny_fit.reference())


def test_a_failure_of_the_main_process_ends_all_and_is_told_once(tiny_fit: TinyFit, tmp_path: Path) -> None:
    run = tmp_path / "run"
    main, other = run_processes(tiny_fit, 2, run, sabotage=("fill_disk_at", "step_00000012", 20_000))
    assert (main.returncode, other.returncode) == (1, 1)
    assert main.errors[0].startswith(f"error: the checkpoint {run}/checkpoints/step_00000012.pt could not be written")
    assert other.errors == []
    refused, other = run_processes(tiny_fit, 2, run, "--lr", 0.5)
    assert "lr was 0.02, is 0.5" in refused.errors[0]
    assert (other.returncode, other.errors) == (1, [])


@pytest.mark.parametrize("chosen", [True, False])
def test_one_thread_is_obeyed_if_it_is_the_user_who_asks_for_it(tmp_path: Path, chosen: bool) -> None:
    """A launcher sets OMP_NUM_THREADS to 1, whoever asked."""
    launcher = tmp_path / "accelerate"
    child = "from bilinear_tc.train.processes import threads_chosen; print(threads_chosen())"
    launcher.write_text(
        "import os, subprocess, sys\n"
        f"subprocess.run([sys.executable, '-c', {child!r}], env=os.environ | {{'OMP_NUM_THREADS': '1'}}, check=True)\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    environment |= {"OMP_NUM_THREADS": "1"} if chosen else {}
    command = [sys.executable, str(launcher)]
    assert subprocess.check_output(command, env=environment, text=True).strip() == str(chosen)


def launch(tiny_fit: TinyFit, run: Path, *flags: object, processes: int) -> subprocess.Popen[str]:
    """`accelerate launch` of a long fit; what it prints on stderr can be read."""
    flags = tiny_fit.flags(run, "--max_steps", 100_000, "--checkpoint_every", 50, *flags)
    accelerate = Path(sys.executable).with_name("accelerate")
    command = [accelerate, "launch", "--cpu", "--num_processes", str(processes), "train/fit.py", *flags]
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    return subprocess.Popen(command, cwd=REPOSITORY, env=environment, stderr=subprocess.PIPE, text=True)


def test_sigterm_to_accelerate_launch_ends_the_fit_with_its_step_saved(tiny_fit: TinyFit, tmp_path: Path) -> None:
    """It dies of it, and tells nobody."""
    run = tmp_path / "run"
    launched = launch(tiny_fit, run, processes=1)
    try:
        wait_until(lambda: launched.poll() is not None or checkpoints(run)[-1:] > [0])
        workers = psutil.Process(launched.pid).children(recursive=True)
        launched.send_signal(signal.SIGTERM)
        _, printed = launched.communicate(timeout=60)
    finally:
        for process in workers:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
    last = checkpoints(run)[-1]
    assert f"error: stopped after step {last} of 100000, which is saved in {run}" in printed, printed
    assert [history.num_rows for _, history in layers(run).values()] == [last, last]


def test_the_sentence_is_the_last_thing_that_a_launcher_leaves(tiny_fit: TinyFit, tmp_path: Path) -> None:
    launched = launch(tiny_fit, tmp_path / "run", "--layers", 7, processes=2)
    _, printed = launched.communicate(timeout=DEADLINE)
    sentence = "the base has layers 0 to 1, but layers 7 were asked for; name existing ones with --layers"
    assert "CalledProcessError" in printed
    assert printed.splitlines()[-1].endswith(f": {sentence}"), printed
    assert launched.returncode != 0


def test_accelerate_launch_starts_them_tells_the_tracker_and_ends_them(tiny_fit: TinyFit, tmp_path: Path) -> None:
    """`accelerate launch --cpu --num_processes 2`, of which one is killed."""
    run = tmp_path / "run"
    launched = launch(tiny_fit, run, "--report_to", "tensorboard", "--checkpoint_every", 4, processes=2)
    try:
        wait_until(lambda: launched.poll() is not None or checkpoints(run)[-1:] > [4])
        workers = [p for p in psutil.Process(launched.pid).children(recursive=True) if "LOCAL_RANK" in p.environ()]
        by_rank = {worker.environ()["LOCAL_RANK"]: worker for worker in workers if worker.environ()["LOCAL_RANK"]}
        assert sorted(by_rank) == ["0", "1"]
        by_rank["1"].kill()
        _, printed = launched.communicate(timeout=DEADLINE)
    finally:
        for process in psutil.Process(launched.pid).children(recursive=True) if launched.poll() is None else []:
            process.kill()
        launched.kill()
    assert launched.returncode != 0
    assert f"error: {LOST}" in printed, printed
    assert "Warning" not in printed, printed
    assert_loads(run)

    facts = yaml.safe_load((run / "layer_0" / "config.yaml").read_text())["fit"]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert (facts["processes"], facts["device"]) == (2, f"{max(1, cores // 2)} CPU threads")

    events = EventAccumulator(str(run / "checkpoints" / "logs" / "bilinear-tc")).Reload()
    histories = {name: history["fvu"].to_pylist() for name, (_, history) in layers(run).items()}
    for name, curve in histories.items():
        told = {event.step: event.value for event in events.Scalars(f"fvu/{name}")}
        assert [told[step] for step in range(1, len(curve) + 1)] == pytest.approx(curve, rel=1e-6)
    means = {event.step: event.value for event in events.Scalars("mean_fvu")}
    both = zip(*histories.values(), strict=False)  # of two processes, one is killed as it writes its layer, or before
    expected = [sum(values) / 2 for values in both]
    assert [means[step] for step in range(1, len(expected) + 1)] == pytest.approx(expected, rel=1e-6)
