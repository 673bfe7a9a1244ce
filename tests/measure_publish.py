"""Measures the peak memory of publishing a set of Pythia-410m's size: `python tests/measure_publish.py [FOLDER]`.

24 layers of random float32 weights (1.2 GB) go to a loopback Hub by the command itself, twice. Takes 2.5 GB of disk and
about a minute on two cores, so that it is no part of the suite. Exits with status 1 above 2 GB.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from hub_server import HubServer
from tiny_run import ROOT, write_tiny_run

LIMIT = 2e9
REPO = "tester/pythia-410m-size"


def measure(run: Path, hub: HubServer, home: Path) -> tuple[float, float]:
    """Peak resident memory in bytes and wall time in seconds of one publication.

    Raises:
        RuntimeError: where the command fails.
    """
    started = time.perf_counter()
    command = [sys.executable, str(ROOT / "upload" / "publish.py"), str(run), "--repo_id", REPO]
    process = subprocess.Popen(command, env=hub.environment(home, token=hub.token))
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"the command ended with {process.returncode}")
    kilobytes = usage.ru_maxrss if sys.platform != "darwin" else usage.ru_maxrss / 1024
    return 1024 * kilobytes, time.perf_counter() - started


def main() -> None:
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None) as folder:
        root = Path(folder)
        run = write_tiny_run(root / "run", layers=range(24), n_inputs=1024, n_hidden=4096, steps=3000)
        size = sum(path.stat().st_size for path in run.rglob("*") if path.is_file())
        with HubServer(root / "hub") as hub:
            peaks = []
            for name in ("first", "second"):
                peak, seconds = measure(run, hub, root / "home")
                peaks.append(peak)
                print(
                    f"{name} publication of {size / 1e9:.2f} GB: peak {peak / 1e9:.2f} GB, {seconds:.0f} s", flush=True
                )
    sys.exit(max(peaks) > LIMIT)


if __name__ == "__main__":
    main()
