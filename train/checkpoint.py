"""Training state on disk: written aside and renamed, the last two kept, the newest one found again."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from accelerate import Accelerator

KEPT = 2


class Checkpoints:
    """The checkpoints of one run, `checkpoints/step_000100` and so on; each is whole or not there.

    Args:
        folder: the run.
        accelerator: saves and loads the states, with `Accelerator.save_state`, on all processes together.
        states: objects with `state_dict` and `load_state_dict`, in a fixed order.
    """

    def __init__(self, folder: Path, accelerator: Accelerator, *states: Any) -> None:
        self.folder = folder / "checkpoints"
        self.accelerator = accelerator
        accelerator.register_for_checkpointing(*states)

    def newest(self) -> Path | None:
        """The newest whole checkpoint."""
        return max(self.folder.glob("step_*"), default=None)

    def save(self, step: int) -> None:
        """Writes the state after `step` steps.

        Raises:
            OSError: where it cannot be written, a full disk for one; the checkpoints before it are as they were.
        """
        final = self.folder / f"step_{step:08d}"
        scratch = self.folder / f".{final.name}"
        main = self.accelerator.is_main_process
        if main:
            shutil.rmtree(scratch, ignore_errors=True)
        failure: Exception | None = None
        try:
            if main:
                scratch.mkdir(parents=True)
            self.accelerator.wait_for_everyone()
            self.accelerator.save_state(str(scratch))
        except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
            failure = error
        self._raise_together(failure, step, scratch)
        if main:
            if final.exists():  # the state of the same step, saved before this process was resumed
                shutil.rmtree(final)
            os.rename(scratch, final)
            for old in sorted(self.folder.glob("step_*"))[:-KEPT]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    def load(self, checkpoint: Path) -> None:
        """Puts the registered states back."""
        self.accelerator.load_state(str(checkpoint))

    def _raise_together(self, failure: Exception | None, step: int, scratch: Path) -> None:
        """Raises on every process if writing failed on any, so that none waits for another."""
        import torch

        failed = torch.tensor(float(failure is not None), device=self.accelerator.device)
        if not self.accelerator.reduce(failed).item():
            return
        if self.accelerator.is_main_process:
            shutil.rmtree(scratch, ignore_errors=True)
        newest = self.newest()
        kept = f"the newest whole checkpoint is {newest.name}" if newest else "there is no earlier checkpoint"
        reason = " ".join(str(failure or "another process failed").split())[:200]
        raise OSError(
            f"the checkpoint of step {step} could not be written to {self.folder} ({reason}): {kept}; free some disk "
            "space and run the same command to resume"
        ) from failure
