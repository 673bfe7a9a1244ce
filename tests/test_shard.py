"""Layers shared out over processes are fitted, saved and measured like layers that every process holds."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import yaml
from bases import tiny_neox
from fitting import TinyFit, assert_loads, assert_same_layers, checkpoints, layers, partial, write_text
from forking import Finished, wait_until
from test_processes import LOST, assert_close_layers
from tokenizers.pre_tokenizers import Whitespace

from bilinear_tc.train.run import Run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def deep(tiny_fit: TinyFit, tmp_path_factory: pytest.TempPathFactory) -> TinyFit:
    """The tiny fit with a base of five layers, which neither 2, 3 nor 4 processes divide."""
    folder = tmp_path_factory.mktemp("deep")
    shutil.copytree(tiny_fit.base, folder / "base")
    vocabulary = json.loads((folder / "base" / "config.json").read_text())["vocab_size"]
    tiny_neox(vocab_size=vocabulary, num_hidden_layers=5, intermediate_size=32).save_pretrained(folder / "base")
    made = TinyFit(tiny_fit.server, folder / "base", tiny_fit.text, folder)
    write_text(folder / "more", shards=7)
    return made


def shared_out(
    fit: TinyFit, count: int, run: Path, *flags: object, sabotage: Sequence[object] = ()
) -> list[Finished]:
    return [p.wait() for p in fit.start_processes(count, run, "--shard", "layers", *flags, sabotage=sabotage)]


@pytest.mark.parametrize(
    ("count", "flags"),
    [
        (2, ()),
        (3, ("--no_pack",)),
        (4, ("--normalization", "batch", "--micro_batch_size", 2)),
        (2, ("--init", "random", "--optimizer", "adamw", "--jvp", 0.1)),
    ],
)
def test_curves_and_weights_are_those_of_one_process(
    deep: TinyFit, tmp_path: Path, count: int, flags: tuple[object, ...]
) -> None:
    settings, run = ("--max_steps", 8, *flags), tmp_path / "run"
    for finished in shared_out(deep, count, run, *settings):
        assert finished.returncode == 0, finished.stderr
    assert_close_layers(run, deep.reference(*settings))
