"""Without a network, what lies on this machine works, and what needs one says so within seconds."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest
import yaml
from fitting import TinyFit
from forking import ForkServer
from hub_server import HubServer
from loading import run_files
from publishing import Publisher
from tiny_run import write_tiny_run

from bilinear_tc.train import evaluate


@pytest.mark.slow
def test_a_cached_set_is_measured_offline(tiny_fit: TinyFit, tmp_path: Path) -> None:
    run = tiny_fit.reference("--max_steps", 4, "--dataset", tiny_fit.text / "shard-[1-5].jsonl")
    text = ("--dataset", tiny_fit.text / "shard-0.jsonl", "--split", "train", "--tokens", 700)
    flags = ("--transcoders", "tester/set", *text, "--output", tmp_path)
    with HubServer(tmp_path / "hub") as hub:
        hub.put("tester/set", run_files(run))
        environment = hub.environment(tmp_path / "home")
        online = tiny_fit.server.start(evaluate.main, flags, environment=environment).wait()
        assert online.returncode == 0, online.output
        measured = json.loads((tmp_path / "evaluation.json").read_text())
        (tmp_path / "evaluation.json").unlink()
        before = len(hub.requests)
        offline = environment | {"HF_HUB_OFFLINE": "1"}
        again = tiny_fit.server.start(evaluate.main, flags, environment=offline).wait()
        assert again.returncode == 0, again.output
        assert len(hub.requests) == before
        assert json.loads((tmp_path / "evaluation.json").read_text()) == measured
        elsewhere = offline | {"HF_HOME": str(tmp_path / "other-home")}
        refused = tiny_fit.server.start(evaluate.main, flags, environment=elsewhere).wait()
        (error,) = refused.errors
        assert error.startswith("error: no transcoders at 'tester/set': expected a run's folder or a Hub repository")


def test_a_dry_run_without_a_network_takes_no_retries(fork_server: ForkServer, tmp_path: Path) -> None:
    run = write_tiny_run(tmp_path / "run")
    recipe = yaml.safe_load((run / "recipe.yaml").read_text()) | {"layers": None, "base": "EleutherAI/pythia-410m"}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with HubServer(tmp_path / "hub") as hub:
        closed = Publisher(fork_server, hub, tmp_path / "home", HF_ENDPOINT="http://127.0.0.1:9")
    started = time.monotonic()
    done = closed.command(run, "--repo_id", "tester/set", "--dry_run")
    assert done.returncode == 0, done.output
    assert "how many layers EleutherAI/pythia-410m has could not be checked" in done.stdout
    assert re.search(r"the files were not compared .*: the connection to the Hub failed once", done.stdout)
    assert "Retrying" not in done.output
    assert time.monotonic() - started < 20
