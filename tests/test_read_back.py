"""What was published is read back as users read it: every layer loads, and the set itself says how."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from hub_server import HubServer
from loading import load_in_fresh_process, saved_output
from publishing import Publisher
from safetensors.torch import load_file, save_file
from tiny_run import write_tiny_run
from transformers import AutoModel

from bilinear_tc.train.run import Run
from bilinear_tc.upload.publish import Publication
from bilinear_tc.upload.repository import build_repository, check_publishable

REPO = "tester/set"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_tiny_run(tmp_path / "run", layers=(0, 1, 2))


@pytest.mark.slow
def test_every_layer_is_loaded_from_the_hub_and_one_layers_weights_are_fetched(
    hub: HubServer, publisher: Publisher, run: Path
) -> None:
    done = publisher.command(run, "--repo_id", REPO)
    assert "every layer loads, and gives the run's outputs" in done.stdout, done.output
    fetched = [request for request in hub.requests if request.startswith("GET") and "safetensors" in request]
    assert {path.split("/layer_")[1][0] for path in fetched} == {"0"}, fetched


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["auto_map", "other weights"])
def test_a_layer_that_users_cannot_load_is_named(hub: HubServer, publisher: Publisher, run: Path, damage: str) -> None:
    """It is damaged after the run was checked."""
    folder = build_repository(Run(run), run / "repository", repo_id=REPO) / "layer_2"
    if damage == "auto_map":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").unlink()  # a link to the run's
        (folder / "config.json").write_text(json.dumps({**config, "auto_map": {}, "model_type": "unknown"}))
        sentence = "layer_2 of tester/set is published at .*, but does not load: "
    else:
        weights = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        save_file(weights | {"head.bias": weights["head.bias"] + 1}, folder / "model.safetensors", {"format": "pt"})
        sentence = "layer_2 of tester/set at .* gives other outputs than the run's"
    done = publisher.send(run, Publication(repo_id=REPO))
    assert done.returncode == 1
    (error,) = done.errors
    assert re.search(sentence, error), error


@pytest.mark.slow
def test_a_set_without_a_layers_name_says_what_to_do(run: Path, tmp_path: Path) -> None:
    folder = build_repository(Run(run), tmp_path / "set")
    with pytest.raises(ValueError, match=r'each of layers 0, 1, 2: name one, as in .*subfolder="layer_0"'):
        AutoModel.from_pretrained(folder, trust_remote_code=True)


def shard(layer: Path) -> None:
    """Splits a layer's weights into two files, as transformers does if they are large."""
    tensors = load_file(layer / "model.safetensors")
    (layer / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[:4], "model-00002-of-00002.safetensors": names[4:]}
    for name, held in parts.items():
        save_file({key: tensors[key] for key in held}, layer / name, {"format": "pt"})
    weight_map = {key: name for name, held in parts.items() for key in held}
    (layer / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.slow
def test_a_layer_in_several_files_is_published_in_one(run: Path, tmp_path: Path) -> None:
    expected = [saved_output(run, layer) for layer in (0, 1, 2)]
    shard(run / "layer_1")
    check_publishable(Run(run))
    folder = build_repository(Run(run), tmp_path / "set")
    assert sorted(path.name for path in (folder / "layer_1").iterdir()) == [
        *("config.json", "config.yaml", "history.parquet", "model.safetensors")
    ]
    assert "were cast" not in (folder / "README.md").read_text()
    environment = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin"}
    asked = [{"attn_implementation": name} for name in ("eager", "sdpa", "flash_attention_2")]
    loads = [{"subfolder": f"layer_{layer}", **asked[layer]} for layer in (0, 1, 2)]
    outputs = load_in_fresh_process(folder, loads, environment, tmp_path / "outputs.pt")
    for (_, _, output), wanted in zip(outputs, expected, strict=True):
        assert torch.equal(output, wanted)
    (run / "layer_1" / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"layer_1/model-00002-of-00002\.safetensors is missing"):
        check_publishable(Run(run))
