"""The README's commands are those that are run, and what it names exists."""

from __future__ import annotations

import re
import subprocess

from quickstart import COMMAND, README, REPOSITORY


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
    assert extracted.endswith("-m pytest -n 2")
    assert extracted in README


def test_every_path_that_the_readme_names_exists():
    paths = re.findall(r"(?:train|upload)/[\w/-]+\.(?:py|md)", README)
    assert paths
    for path in paths:
        assert (REPOSITORY / path).exists(), path
