"""The README's snippets, executed as printed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from quickstart import COMMAND, REPOSITORY

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def beside_the_run(tmp_path, quickstart_run) -> Path:
    """A folder that looks like the root of a clone in which the quickstart has run."""
    (tmp_path / "train").symlink_to(REPOSITORY / "train")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "quickstart").symlink_to(quickstart_run.folder)
    return tmp_path


@pytest.mark.slow
def test_python_snippets_run_as_printed(beside_the_run, tmp_path_factory):
    snippets = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert snippets
    environment = os.environ | {"HF_HOME": str(tmp_path_factory.mktemp("hf")), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(  # one after the other: each goes on from those before
        [sys.executable, "-c", "\n".join(snippets)], cwd=beside_the_run, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    unexplained = float(re.search(r"unexplained: ([\d.]+)", done.stdout)[1])
    loss, spliced = map(float, re.search(r"loss ([\d.]+), with the transcoder ([\d.]+)", done.stdout).groups())
    assert 0 < unexplained < 0.4
    assert abs(spliced - loss) < 0.2 * loss
    of_layers = re.search(r"by layer: \{0: .*, 3: ([\d.]+),", done.stdout)
    assert abs(float(of_layers[1]) - unexplained) < 0.1


def test_the_tests_run_the_readmes_quickstart_command():
    commands = re.findall(r"```bash\n(.*?)\n```", README, re.DOTALL)
    set_up = "python3 -m venv .venv && .venv/bin/pip install -e . && .venv/bin/"
    assert commands[0] == set_up + COMMAND


def test_ci_runs_the_readmes_test_command():
    ci = (REPOSITORY / ".ci" / "run").read_text()
    extracted = subprocess.run(
        ["bash", "-c", re.search(r"^command=\$\((.*)\)$", ci, re.MULTILINE)[1]],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    assert extracted.endswith("-m pytest")
    assert extracted in README


def test_every_path_that_the_readme_names_exists():
    paths = re.findall(r"(?:train|upload)/[\w/-]+\.(?:py|md)", README)
    assert paths
    for path in paths:
        assert (REPOSITORY / path).exists(), path
