"""Damaged files of a run, some three hundred of them: each is refused in a sentence, or does no harm."""

from __future__ import annotations

import copy
import json
import random
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import constants
from matplotlib.figure import Figure
from tiny_run import write_tiny_run

from bilinear_tc.train.checkpoint import Checkpoints
from bilinear_tc.train.errors import UserError
from bilinear_tc.train.recipe import named_recipe
from bilinear_tc.train.run import Run
from bilinear_tc.upload.legacy import export_run
from bilinear_tc.upload.pt_checkpoint import read_checkpoint
from bilinear_tc.upload.repository import build_repository, check_publishable

VALUES: list[Any] = [None, True, -1, 0, 3, 1e300, float("nan"), "", "text", "1e-3", [], [1], {}, {"a": 1}, "é" * 400]


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_run(tmp_path_factory.mktemp("fuzz") / "pristine")


def mutated(content: Any, chance: random.Random) -> Any:
    """A document in which one value, at any depth, is another, missing, or under another name."""
    content = copy.deepcopy(content)
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key in list(node if isinstance(node, dict) else range(len(node))):
            places.append((node, key))
            if isinstance(node[key], (dict, list)):
                walk(node[key])

    walk(content)
    node, key = chance.choice(places)
    what = chance.randrange(6)
    if what == 0 and isinstance(node, dict):
        del node[key]
    elif what == 1 and isinstance(node, dict):
        node[f"{key}x"] = node.pop(key)
    else:
        node[key] = chance.choice(VALUES)
    return content if chance.randrange(20) else chance.choice(VALUES)


def damaged(content: bytes, chance: random.Random) -> bytes:
    """A file cut short, with a bit turned over, a stretch of zeros, or something else's content."""
    at = chance.randrange(len(content))
    return [
        content[:at],
        content[:at] + bytes([content[at] ^ (1 << chance.randrange(8))]) + content[at + 1 :],
        content[:at] + bytes(min(8, len(content) - at)) + content[at + 8 :],
        b"not at all what was expected",
        b"",
    ][chance.randrange(5)]


def refused_or_published(run: Path, target: Path) -> None:
    """All that publishing does before it asks the Hub."""
    try:
        opened = Run(run)
        check_publishable(opened)
        build_repository(opened, target)
    except UserError:
        return


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """A base of another name is not looked for."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.mark.parametrize(
    ("name", "read", "write", "count"),
    [
        ("recipe.yaml", yaml.safe_load, yaml.safe_dump, 60),
        ("evaluation.json", json.loads, json.dumps, 60),
        ("layer_1/config.yaml", yaml.safe_load, yaml.safe_dump, 40),
        ("layer_1/config.json", json.loads, json.dumps, 60),
    ],
)
@pytest.mark.slow
def test_a_file_of_other_values_is_refused_or_does_no_harm(
    pristine: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    read: Callable,
    write: Callable,
    count: int,
) -> None:
    if name != "evaluation.json":  # the values of the others are not drawn, and drawing takes four fifths of the time
        monkeypatch.setattr(Figure, "savefig", lambda _figure, path, **_: Path(path).touch())
    run = tmp_path / "run"
    shutil.copytree(pristine, run)
    content = (pristine / name).read_text(encoding="utf-8")
    for seed in range(count):
        changed = write(mutated(read(content), random.Random(seed)))
        (run / name).write_text(changed, encoding="utf-8")
        try:
            refused_or_published(run, tmp_path / "repository")
        except Exception as error:
            raise AssertionError(f"{name} of seed {seed} fails: {changed[:2000]}") from error


@pytest.mark.parametrize("name", ["recipe.yaml", "evaluation.json", "layer_0/config.json", "layer_0/history.parquet"])
@pytest.mark.slow
def test_a_damaged_file_is_refused_or_does_no_harm(pristine: Path, tmp_path: Path, name: str) -> None:
    run = tmp_path / "run"
    shutil.copytree(pristine, run)
    content = (pristine / name).read_bytes()
    for seed in range(15):
        (run / name).write_bytes(damaged(content, random.Random(seed)))
        try:
            refused_or_published(run, tmp_path / "repository")
        except Exception as error:
            raise AssertionError(f"{name} of seed {seed} fails") from error


def test_a_recipe_file_of_other_values_is_a_recipe_or_refused(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    content = {"base": "a/b", "lr": 0.02, "max_steps": 3, "pack": True, "layers": "0-3", "init": "mlp", "seed": 0}
    for seed in range(60):
        file.write_text(yaml.safe_dump(mutated(content, random.Random(seed))), encoding="utf-8")
        with suppress(UserError):
            named_recipe(str(file))


class Kept:
    """A state, whole and of two layers, that remembers what it was given."""

    held = written = range(2)

    def __init__(self) -> None:
        self.tensor, self.number = torch.arange(2000, dtype=torch.float32), 7

    def state_dict(self) -> dict[str, Any]:
        return {"tensor": self.tensor, "number": self.number}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert torch.equal(state["tensor"], self.tensor)
        assert state["number"] == self.number

    def layer_state(self, layer: int) -> dict[str, Any]:
        return {"tensor": self.tensor + layer, "number": self.number}

    def load_layer_state(self, layer: int, state: dict[str, Any]) -> None:
        self.load_state_dict({"tensor": state["tensor"] - layer, "number": state["number"]})


def test_a_damaged_checkpoint_is_never_resumed_from(tmp_path: Path) -> None:
    checkpoints = Checkpoints(Run(tmp_path), {"kept": Kept()}, Kept())
    checkpoints.save(1)
    for end in ("", ".0", ".1"):
        file = tmp_path / "checkpoints" / f"step_00000001{end}.pt"
        content = file.read_bytes()
        for seed in range(60):
            file.write_bytes(damaged(content, random.Random(seed)))
            with suppress(UserError):
                assert checkpoints.load_newest()  # and finds what was saved
        file.write_bytes(content)


def test_a_checkpoint_of_an_earlier_version_is_refused_as_such(tmp_path: Path) -> None:
    """It held all layers in its one file."""
    checkpoints = Checkpoints(Run(tmp_path), {"kept": Kept()}, Kept())
    (tmp_path / "checkpoints").mkdir()
    torch.save({"kept": Kept().state_dict()}, tmp_path / "checkpoints" / "step_00000001.pt")
    with pytest.raises(
        UserError, match=r"\(an earlier version has written it\), and no .*: start anew with --no_resume"
    ):
        checkpoints.load_newest()


def test_a_damaged_pt_file_is_never_imported(pristine: Path, tmp_path: Path) -> None:
    file, _ = export_run(Run(pristine), tmp_path / "exported")
    content, expected = file.read_bytes(), read_checkpoint(file)
    for seed in range(60):
        file.write_bytes(damaged(content, random.Random(seed)))
        with suppress(UserError):
            found = read_checkpoint(file)
            assert all(torch.equal(found.weights[name], tensor) for name, tensor in expected.weights.items())
