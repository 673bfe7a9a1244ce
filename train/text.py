"""A text source (Hub id, folder, files or Python's own standard library) as a stream of documents."""

from __future__ import annotations

import hashlib
import sysconfig
from pathlib import Path

PYTHON_STDLIB = "python-stdlib"


def python_stdlib_files() -> dict[str, list[str]]:
    """The `.py` files of the running interpreter's standard library, held out by file.

    About one file in ten, chosen by a hash of its path inside the library and so the same for every
    Python version, is in "validation"; the others are in "train". The same hash orders the files, so that
    neighbours in the stream are unrelated. Tests (which some distributions leave out), character tables
    and installed packages are left out.
    """
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "__pycache__"}
    splits: dict[str, list[str]] = {"train": [], "validation": []}

    def path_hash(path: Path) -> bytes:
        return hashlib.sha256(path.relative_to(root).as_posix().encode()).digest()

    for path in sorted(root.rglob("*.py"), key=path_hash):
        if left_out.isdisjoint(path.relative_to(root).parts) and path.stat().st_size:
            splits["validation" if path_hash(path)[-1] < 26 else "train"].append(str(path))
    return splits
