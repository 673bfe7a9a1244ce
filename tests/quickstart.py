"""The README's quickstart, by the command that it prints."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
COMMAND = "accelerate launch train/fit.py --recipe quickstart"
LAYERS = range(6)
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


@dataclass(frozen=True)
class QuickstartRun:
    """The quickstart as it went: its run and what it printed."""

    folder: Path
    printed: str


def run_quickstart(folder: Path) -> QuickstartRun:
    program, *arguments = COMMAND.split()
    command = [Path(sys.executable).with_name(program), *arguments, "--output_dir", folder]
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    finished = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr[-4000:]
    return QuickstartRun(folder, finished.stdout)
