"""Training state on disk: each checkpoint whole or absent, the last two kept, the newest one found again."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator

from bilinear_tc.train.processes import on_main

KEPT = 2


class Stateful(Protocol):
    """What a checkpoint can hold: an object whose state is of tensors, numbers, strings, lists and dicts."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Checkpoints:
    """The checkpoints of one run: `checkpoints/step_00000100.pt` and so on.

    The main process writes them and every process reads them, so several machines must share the run's folder.

    Args:
        run: the run's folder.
        accelerator: the processes.
        states: what a checkpoint holds, by name; the main process's state must do for all of them.
    """

    def __init__(self, run: Path, accelerator: Accelerator, states: Mapping[str, Stateful]) -> None:
        self.folder = run / "checkpoints"
        self.accelerator = accelerator
        self.states = states

    def save(self, step: int) -> None:
        """Writes the state after `step` steps; for all processes together.

        Raises:
            OSError: where it cannot be written, as on a full disk; the checkpoints before it are as they were.
        """
        on_main(self.accelerator, lambda: self._write(self.folder / f"step_{step:08d}.pt"))

    def load_newest(self) -> bool:
        """Puts the newest checkpoint's states back; returns False where there is none.

        Raises:
            OSError: where it cannot be read.
        """
        newest = on_main(self.accelerator, lambda: next(reversed(_oldest_first(self.folder)), None))
        if newest is None:
            return False
        try:
            saved = torch.load(newest, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever unpickling a damaged file raises
            raise OSError(
                f"the checkpoint {newest} cannot be read ({_reason(error)}): delete it to go on from the one before, "
                "or start anew with --no_resume"
            ) from error
        for name, state in self.states.items():
            state.load_state_dict(saved[name])
        return True

    def _write(self, path: Path) -> None:
        scratch = path.with_name(f".{path.name}.partial")
        try:
            self.folder.mkdir(exist_ok=True)
            with scratch.open("wb") as file:
                torch.save({name: state.state_dict() for name, state in self.states.items()}, file)
                file.flush()
                os.fsync(file.fileno())  # else a rename may outlive a power failure and the bytes not
            os.replace(scratch, path)
        except (OSError, RuntimeError) as error:  # torch reports a failed write as a RuntimeError
            scratch.unlink(missing_ok=True)
            newest = newest_step(self.folder.parent)
            raise OSError(
                f"the checkpoint {path} could not be written ({_reason(error)}): "
                + ("there is no earlier one" if newest is None else f"that of step {newest} is whole")
                + "; make room on the disk and run the same command to go on"
            ) from error
        for old in _oldest_first(self.folder)[:-KEPT]:
            old.unlink()


def newest_step(run: Path) -> int | None:
    """The step of a run's newest checkpoint, or None where it has none."""
    checkpoints = _oldest_first(run / "checkpoints")
    return int(checkpoints[-1].stem.removeprefix("step_")) if checkpoints else None


def _oldest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("step_*.pt"))


def _reason(error: BaseException) -> str:
    """An exception's message on one line, cut short: torch's own hold a trace."""
    return " ".join(str(error).split())[:200] or type(error).__name__
