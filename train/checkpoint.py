"""Training state on disk: each checkpoint is whole or absent, the last two are kept, and the newest is found again."""

from __future__ import annotations

import logging
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from bilinear_tc.train.errors import StorageError, UserError, one_line
from bilinear_tc.train.files import written_whole
from bilinear_tc.train.processes import on_main
from bilinear_tc.train.run import CHECKPOINTS, Run

logger = logging.getLogger(__name__)

KEPT = 2


class Stateful(Protocol):
    """What a checkpoint can hold: an object whose state is of tensors, numbers, strings, lists and dicts."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Checkpoints:
    """The checkpoints of one run: `checkpoints/step_00000100.pt` and so on.

    The main process writes them and every process reads them, so several machines must share the run's folder.

    Args:
        run: the run.
        states: what a checkpoint holds, by name; the main process's state must do for all of them.
    """

    def __init__(self, run: Run, states: Mapping[str, Stateful]) -> None:
        self.folder = run.folder / CHECKPOINTS
        self.states = states

    def save(self, step: int) -> None:
        """Writes the state after `step` steps; for all processes together.

        StorageError if it cannot be written, as on a full disk; the checkpoints before it are as they were.
        """
        on_main(lambda: self._write(f"step_{step:08d}.pt"))

    def load_newest(self) -> bool:
        """Puts the states of the newest whole checkpoint back; returns False if there are no checkpoints.

        UserError if there are, but none can be read.
        """
        read: dict[Path, dict[str, Any]] = {}
        newest = on_main(lambda: self._newest_whole(read))
        if newest is None:
            return False
        saved = read.get(newest) or self._read(newest)
        for name, state in self.states.items():
            state.load_state_dict(saved[name])
        return True

    def _newest_whole(self, read: dict[Path, dict[str, Any]]) -> Path | None:
        """The newest checkpoint that can be read, with a warning of each that cannot; its content goes to `read`."""
        damaged: UserError | None = None
        for path in reversed(_oldest_first(self.folder)):
            try:
                read[path] = self._read(path)
                return path
            except UserError as error:
                logger.warning("%s: looking for an earlier one", error)
                damaged = error
        if damaged is not None:
            raise UserError(f"{damaged}, and no earlier one is whole: start anew with --no_resume") from damaged
        return None

    def _read(self, path: Path) -> dict[str, Any]:
        """What a checkpoint holds; UserError if the file is damaged, gone, or of something else."""
        try:
            with zipfile.ZipFile(path) as archive:  # torch writes a checksum of each part, and does not look at it
                if part := archive.testzip():
                    raise ValueError(f"{part} is not what was written")
            saved = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever unpickling a damaged file raises
            raise UserError(f"the checkpoint {path} cannot be read ({one_line(error, 200)})") from error
        if not isinstance(saved, dict) or set(saved) != set(self.states):
            raise UserError(f"the checkpoint {path} cannot be read (it holds something else than this fit's state)")
        return saved

    def _write(self, name: str) -> None:
        try:
            self.folder.mkdir(exist_ok=True)
            with written_whole(self.folder) as scratch, (scratch / name).open("wb") as file:
                torch.save({name: state.state_dict() for name, state in self.states.items()}, file)
        except (OSError, RuntimeError) as error:  # torch reports a failed write as a RuntimeError
            newest = newest_step(self.folder.parent)
            raise StorageError(
                f"the checkpoint {self.folder / name} could not be written ({one_line(error, 200)}): "
                + ("there is no earlier one" if newest is None else f"that of step {newest} is whole")
                + "; make room on the disk and run the same command to resume"
            ) from error
        for old in _oldest_first(self.folder)[:-KEPT]:
            old.unlink()


def newest_step(folder: Path) -> int | None:
    """The step of the newest checkpoint in a run's folder, or None if it has none."""
    checkpoints = _oldest_first(folder / CHECKPOINTS)
    return int(checkpoints[-1].stem.removeprefix("step_")) if checkpoints else None


def _oldest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("step_*.pt"))
