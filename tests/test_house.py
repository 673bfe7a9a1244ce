"""How the code is laid out: data flows one way, and each file is of a size that one subject needs."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOT_FILES = [ROOT / "configuration_bilinear_tc.py", ROOT / "modeling_bilinear_tc.py"]
ROOMS = sorted(path for room in ("train", "upload") for path in (ROOT / room).rglob("*.py"))


def module_name(path: Path) -> str:
    return ".".join(["bilinear_tc", *path.relative_to(ROOT).with_suffix("").parts])


def imported(path: Path) -> set[str]:
    """The modules of the project that a file imports, anywhere in it."""
    nodes = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.ImportFrom)]
    return {node.module for node in nodes if node.module and node.module.startswith("bilinear_tc")}


IMPORTS = {module_name(path): imported(path) for path in [*ROOT_FILES, *ROOMS]}
ENTRIES = {module_name(path) for path in ROOMS if 'if __name__ == "__main__":' in path.read_text(encoding="utf-8")}


def test_no_import_runs_in_a_circle() -> None:
    left = dict(IMPORTS)
    while free := [module for module, needed in left.items() if not needed & left.keys()]:
        for module in free:
            del left[module]
    assert not left


def test_train_knows_nothing_of_upload_and_the_root_files_nothing_of_either() -> None:
    assert not any(
        needed.startswith("bilinear_tc.upload") for m, n in IMPORTS.items() if ".train." in m for needed in n
    )
    assert [IMPORTS[module_name(path)] for path in ROOT_FILES] == [set(), set()]


def test_scripts_import_rooms_and_never_one_another() -> None:
    assert {f"bilinear_tc.{name}" for name in ("train.fit", "train.evaluate", "upload.publish")} < ENTRIES
    drawing = {"bilinear_tc.upload.figures"}  # a room that is a command too
    studies = {module for module in ENTRIES if ".studies." in module}  # tune runs the fits of compare
    for module, needed in IMPORTS.items():
        assert not needed & (ENTRIES - drawing - studies), module


@pytest.mark.parametrize("path", ROOMS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_file_is_of_one_subjects_size_and_hides_no_module_of_the_standard_library(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400
    assert path.stem not in sys.stdlib_module_names


def test_product_code_knows_accelerate_only_where_processes_start_and_trackers_are_told() -> None:
    users = {path.relative_to(ROOT).as_posix() for path in ROOMS if "accelerate import" in path.read_text()}
    assert users == {"train/fit.py", "train/processes.py"}
