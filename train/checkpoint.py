"""Training state on disk: each checkpoint is whole or absent, the last two are kept, and the newest is found again."""

from __future__ import annotations

import logging
import zipfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, Protocol

import torch

from bilinear_tc.train.errors import StorageError, UserError, one_line
from bilinear_tc.train.files import delete_files, sha256_of, written_whole
from bilinear_tc.train.processes import is_main, on_all, on_main
from bilinear_tc.train.run import CHECKPOINTS, Run

logger = logging.getLogger(__name__)

KEPT = 2


class Stateful(Protocol):
    """What a checkpoint can hold: an object whose state is of tensors, numbers, strings, lists and dicts."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Layered(Protocol):
    """What a checkpoint holds a file a layer of: layers are counted from 0, those of all processes together."""

    held: range  # the layers that this process goes on with
    written: range  # and those that it writes: each is written by one process

    def layer_state(self, layer: int) -> dict[str, Any]: ...
    def load_layer_state(self, layer: int, state: dict[str, Any]) -> None: ...


class Checkpoints:
    """The checkpoints of one run: `checkpoints/step_00000100.pt` and so on.

    The layers' states lie beside it, `step_00000100.0.pt` and so on, each written by one of the processes; the
    file that makes them a checkpoint comes last and holds their hashes. Any number of processes can go on from it, so
    several machines must share the run's folder.

    Args:
        run: the run.
        states: what the last file holds, by name; the main process's state must do for all of them.
        layered: what the layers' files hold.
    """

    def __init__(self, run: Run, states: Mapping[str, Stateful], layered: Layered) -> None:
        self.folder = run.folder / CHECKPOINTS
        self.states, self.layered = states, layered

    def save(self, step: int) -> None:
        """Writes the state after `step` steps; for all processes together.

        StorageError if it cannot be written, as on a full disk; the checkpoints before it are as they were.
        """
        of_layers = on_all(lambda: self._write_layers(step))
        hashes = {name: value for of_process in of_layers for name, value in of_process.items()}

        def complete() -> None:
            states = {name: state.state_dict() for name, state in self.states.items()}
            self._write(step, {f"step_{step:08d}.pt": lambda: {**states, "layers": hashes}})
            kept = {path.stem for path in _oldest_first(self.folder)[-KEPT:]}
            files = sorted(self.folder.glob("step_*.pt"), reverse=True)  # a checkpoint's last file goes first
            delete_files(file for file in files if file.name.partition(".")[0] not in kept)

        on_main(complete)

    def load_newest(self) -> bool:
        """Puts the states of the newest whole checkpoint back; returns False if there are no checkpoints. For all
        processes together.

        UserError if there are, but none can be read.
        """
        problem = None
        for path in reversed(on_main(lambda: _oldest_first(self.folder))):
            read: dict[str, Any] = {}
            problem = next(filter(None, on_all(partial(self._problem, path, read))), None)
            if problem is None:
                for name, state in self.states.items():
                    state.load_state_dict(read[name])
                for layer in self.layered.held:
                    self.layered.load_layer_state(layer, _load(_of_layer(path, layer)))
                return True
            if is_main():
                logger.warning("%s: looking for an earlier one", problem)
        if problem is not None:
            on_main(partial(_refuse, f"{problem}, and no earlier one is whole: start anew with --no_resume"))
        return False

    def _problem(self, path: Path, read: dict[str, Any]) -> str | None:
        """What is wrong with a checkpoint, or with the layers' files that this process needs; None if they are whole.
        What it holds goes to `read`."""
        try:
            with zipfile.ZipFile(path) as archive:  # torch writes a checksum of each part, and does not look at it
                if part := archive.testzip():
                    raise ValueError(f"{part} is not what was written")
            read |= _load(path)
            if set(read) != {*self.states, "layers"}:
                earlier = set(read) == {*self.states}
                raise ValueError(
                    "an earlier version has written it" if earlier else "it holds something else than this fit's state"
                )
            for file in (_of_layer(path, layer) for layer in self.layered.held):
                if sha256_of(file) != read["layers"][file.name]:
                    raise ValueError(f"{file.name} is not what was written")
        except Exception as error:  # whatever unpickling a damaged file raises
            return f"the checkpoint {path} cannot be read ({one_line(error, 200)})"
        return None

    def _write_layers(self, step: int) -> dict[str, str]:
        """Writes the layers' files that are this process's to write; their hashes by name."""
        of_layer, layers = self.layered.layer_state, self.layered.written
        return self._write(step, {f"step_{step:08d}.{layer}.pt": partial(of_layer, layer) for layer in layers})

    def _write(self, step: int, contents: Mapping[str, Callable[[], dict[str, Any]]]) -> dict[str, str]:
        """Writes files of a checkpoint, by name; returns their hashes."""
        try:
            self.folder.mkdir(exist_ok=True)
            with written_whole(self.folder) as scratch:
                for name, content in contents.items():
                    with (scratch / name).open("wb") as file:
                        torch.save(content(), file)
                return {name: sha256_of(scratch / name) for name in contents}
        except (OSError, RuntimeError) as error:  # torch reports a failed write as a RuntimeError
            newest = newest_step(self.folder.parent)
            raise StorageError(
                f"the checkpoint {self.folder / f'step_{step:08d}.pt'} could not be written ({one_line(error, 200)}): "
                + ("there is no earlier one" if newest is None else f"that of step {newest} is whole")
                + "; make room on the disk and run the same command to resume"
            ) from error


def newest_step(folder: Path) -> int | None:
    """The step of the newest checkpoint in a run's folder, or None if it has none."""
    checkpoints = _oldest_first(folder / CHECKPOINTS)
    return int(checkpoints[-1].stem.removeprefix("step_")) if checkpoints else None


def _oldest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("step_????????.pt"))


def _of_layer(checkpoint: Path, layer: int) -> Path:
    return checkpoint.with_suffix(f".{layer}.pt")


def _load(path: Path) -> dict[str, Any]:
    return torch.load(path, map_location="cpu", weights_only=True)


def _refuse(sentence: str) -> NoReturn:
    raise UserError(sentence)
