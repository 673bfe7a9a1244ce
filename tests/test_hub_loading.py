"""A layer loads the way users load models: by repository id over HTTP, or from a folder, in a fresh process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bases import write_base
from hub_server import HubServer
from huggingface_hub import HfApi
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from loading import load_in_fresh_process, run_files, saved_output
from tiny_run import write_tiny_run


@pytest.mark.slow
def test_layers_load_over_http_at_every_kind_of_revision(tmp_path: Path) -> None:
    old = write_tiny_run(tmp_path / "old", layers=(0, 3), seed=1)
    new = write_tiny_run(tmp_path / "new", layers=(0, 3), seed=2)
    with HubServer(tmp_path / "hub") as hub:
        commit = hub.put("tester/set", run_files(old))
        api = HfApi(endpoint=hub.url, token=hub.token)
        api.create_branch("tester/set", branch="feature/old", revision=commit)
        api.create_tag("tester/set", tag="v1", revision=commit)
        hub.put("tester/set", run_files(new))
        at_old = [{"subfolder": "layer_3", "revision": revision} for revision in (commit, "feature/old", "v1")]
        loads = [{"subfolder": "layer_0"}, {"subfolder": "layer_3"}, *at_old]
        environment = hub.environment(tmp_path / "home")
        outputs = load_in_fresh_process("tester/set", loads, environment, tmp_path / "outputs.pt")
        assert not hub.leaks
    expected = [saved_output(new, 0), saved_output(new, 3), *[saved_output(old, 3)] * 3]
    assert [(layer, name) for layer, name, _ in outputs] == [(0, "BilinearTC")] + [(3, "BilinearTC")] * 4
    for (_, _, output), wanted in zip(outputs, expected, strict=True):
        assert torch.equal(output, wanted)
    assert not torch.equal(expected[1], expected[2])


@pytest.mark.slow
def test_layers_load_from_a_folder(tmp_path: Path) -> None:
    run = write_tiny_run(tmp_path / "run", layers=(0, 3), form="input_sum")
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    loads = [{"subfolder": "layer_0"}, {"subfolder": "layer_3"}]
    outputs = load_in_fresh_process(run, loads, environment, tmp_path / "outputs.pt")
    for (layer, _, output), wanted in zip(outputs, (0, 3), strict=True):
        assert layer == wanted
        assert torch.equal(output, saved_output(run, wanted))


BASE_LOADER = """
import sys
from bilinear_tc.train.base import Base
print(Base.load("tester/base").commit, Base.load("tester/base", revision=sys.argv[1]).commit)
"""


@pytest.mark.slow
def test_a_layer_loads_where_and_as_what_it_is_asked_to(tmp_path: Path) -> None:
    run = write_tiny_run(tmp_path / "run", layers=(3,))
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    dtypes, placings = ("float32", "bfloat16"), ({}, {"device_map": "auto"}, {"device_map": {"": "cpu"}})
    loads = [{"subfolder": "layer_3", "dtype": dtype, **placing} for dtype in dtypes for placing in placings]
    outputs, expected = load_in_fresh_process(run, loads, environment, tmp_path / "outputs.pt"), saved_output(run, 3)
    for load, (_, _, output) in zip(loads, outputs, strict=True):
        assert output.dtype == getattr(torch, load["dtype"])
        tolerance = {"float32": 1e-5, "bfloat16": 0.03}[load["dtype"]] * expected.abs().max()
        assert (output - expected).abs().max() < tolerance


@pytest.mark.slow
def test_a_base_knows_the_commit_that_it_was_loaded_at(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    with HubServer(tmp_path / "hub") as hub:
        old = hub.put("tester/base", {file.name: file for file in base.iterdir()})
        new = hub.put("tester/base", {"README.md": b"another commit"})
        command = [sys.executable, "-c", BASE_LOADER, old]
        environment = hub.environment(tmp_path / "home")
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert old != new
    assert done.stdout.split() == [new, old]


@pytest.mark.slow
def test_a_private_set_loads_with_a_token_only(tmp_path: Path) -> None:
    run = write_tiny_run(tmp_path / "run", layers=(3,))
    with HubServer(tmp_path / "hub") as hub:
        hub.create("tester/secret", private=True)
        hub.put("tester/secret", run_files(run))
        environment = hub.environment(tmp_path / "home", token=hub.read_token)
        [(_, _, output)] = load_in_fresh_process(
            "tester/secret", [{"subfolder": "layer_3"}], environment, tmp_path / "o"
        )
        assert torch.equal(output, saved_output(run, 3))
        with pytest.raises(RepositoryNotFoundError):
            HfApi(endpoint=hub.url, token=False).model_info("tester/secret")
        assert not hub.leaks


@pytest.mark.parametrize(
    ("repo_id", "revision", "path", "error"),
    [
        ("tester/none", "main", "a.txt", RepositoryNotFoundError),
        ("tester/set", "none", "a.txt", RevisionNotFoundError),
        ("tester/set", "main", "none.txt", EntryNotFoundError),
    ],
)
def test_the_server_refuses_as_the_hub_does(
    tmp_path: Path, repo_id: str, revision: str, path: str, error: type[HfHubHTTPError]
) -> None:
    with HubServer(tmp_path / "hub") as hub:
        hub.put("tester/set", {"a.txt": b"text", "b.bin": bytes(1000)})
        api = HfApi(endpoint=hub.url, token=hub.token)
        with pytest.raises(error):
            api.hf_hub_download(repo_id, path, revision=revision, cache_dir=tmp_path / "cache")
        kept = api.hf_hub_download("tester/set", "b.bin", cache_dir=tmp_path / "cache")
        assert Path(kept).read_bytes() == bytes(1000)
