"""No layer of a fit ends worse than it began."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from bases import QUICKSTART
from fitting import TinyFit, write_text

from bilinear_tc.train.run import Run

HELD_OUT = ("--eval_tokens", 2816)
HELPFUL = ("--base", QUICKSTART, "--layers", 1, "--batch_size", 64, "--max_steps", 6, "--normalization", "running")
HARMFUL = ("--lr", 3.0, "--max_steps", 4)


def held_out(tiny_fit: TinyFit, *more: object) -> tuple[object, ...]:
    text = tiny_fit.folder / "more"
    if not text.is_dir():
        write_text(text, shards=7)  # of which the fit's text has the first six
    return ("--eval_split", text / "shard-6.jsonl", *HELD_OUT, *more)


def fits(run: Run) -> list[dict]:
    return [yaml.safe_load((run.layer_folder(layer) / "config.yaml").read_text())["fit"] for layer in run.layers]


def weights(run: Path, layer: int) -> dict[str, torch.Tensor]:
    return Run(run).load(layer).state_dict()


@pytest.fixture(scope="module")
def harmed(tiny_fit: TinyFit) -> Run:
    return Run(tiny_fit.reference(*held_out(tiny_fit, *HARMFUL)))


@pytest.fixture(scope="module")
def closed_form(tiny_fit: TinyFit) -> Run:
    return Run(tiny_fit.reference(*held_out(tiny_fit, "--max_steps", 0)))


@pytest.mark.slow
def test_a_layer_that_its_steps_harm_is_put_back_to_the_closed_form(harmed: Run, closed_form: Run) -> None:
    for layer, fit in zip(harmed.layers, fits(harmed), strict=True):
        assert fit["kept"] == "start"
        assert fit["fvu_start"] < fit["fvu_end"]
        before, after = weights(closed_form.folder, layer), weights(harmed.folder, layer)
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert harmed.evaluation.layers[layer].fvu == pytest.approx(fit["fvu_start"], rel=1e-6)
        assert closed_form.evaluation.layers[layer].fvu == pytest.approx(fit["fvu_start"], rel=1e-6)


@pytest.mark.slow
def test_a_layer_that_gains_keeps_its_steps(tiny_fit: TinyFit) -> None:
    closed_form = Run(tiny_fit.reference(*held_out(tiny_fit, *HELPFUL, "--max_steps", 0)))
    run = Run(tiny_fit.reference(*held_out(tiny_fit, *HELPFUL)))
    for layer, fit in zip(run.layers, fits(run), strict=True):
        assert fit["kept"] == "end"
        assert fit["fvu_end"] < fit["fvu_start"]
        assert fit["fvu_start"] == pytest.approx(closed_form.evaluation.layers[layer].fvu, rel=1e-6)
        assert run.evaluation.layers[layer].fvu == pytest.approx(fit["fvu_end"], rel=1e-6)


@pytest.mark.slow
def test_the_table_says_which_layers_are_as_they_began(tiny_fit: TinyFit, harmed: Run) -> None:
    again = tiny_fit.run(harmed.folder, *held_out(tiny_fit, *HARMFUL))
    assert again.returncode == 0, again.stderr
    assert "at the start" in again.stdout
    for layer, fit in zip(harmed.layers, fits(harmed), strict=True):
        words = f"layer {layer} is as the fit began with it: its steps ended with a higher FVU, {fit['fvu_end']:.4f}"
        assert words in again.stdout


@pytest.mark.slow
def test_a_layer_that_was_put_back_stays_so_when_it_is_measured_anew(
    tiny_fit: TinyFit, harmed: Run, tmp_path: Path
) -> None:
    """On other held-out text: the end that it was compared with is no longer there, nor is a measure of it."""
    shutil.copytree(harmed.folder, tmp_path / "run")
    flags = (*held_out(tiny_fit, *HARMFUL), "--eval_tokens", 4224)
    finished = tiny_fit.run(tmp_path / "run", *flags)
    assert finished.returncode == 0, finished.stderr
    for old, new in zip(fits(harmed), fits(Run(tmp_path / "run")), strict=True):
        assert (new["kept"], "fvu_end" in old, "fvu_end" in new) == ("start", True, False)
        assert new["fvu_start"] != old["fvu_start"]
    assert "layer 0 is as the fit began with it: its steps ended with a higher FVU\n" in finished.stdout


@pytest.mark.slow
def test_a_kill_while_layers_are_put_back_ends_in_the_same_set(tiny_fit: TinyFit, harmed: Run, tmp_path: Path) -> None:
    """After the first layer's weights were put back, and before the export was noted anew."""
    run = tmp_path / "run"
    shutil.copytree(harmed.folder, run)
    (run / "evaluation.json").unlink()
    (run / "layer_0" / "config.yaml").write_text("fit: {steps: 4}\n")  # so that no hash fits
    finished = tiny_fit.run(run, *held_out(tiny_fit, *HARMFUL))
    assert finished.returncode == 0, finished.stderr
    for layer in harmed.layers:
        for name in ("model.safetensors", "config.json"):
            digests = {
                hashlib.sha256((r / f"layer_{layer}" / name).read_bytes()).digest() for r in (run, harmed.folder)
            }
            assert len(digests) == 1
    assert [f["kept"] for f in fits(Run(run))] == ["start", "start"]


@pytest.mark.slow
def test_a_kill_before_the_start_was_written_loses_it_not(tiny_fit: TinyFit, tmp_path: Path) -> None:
    """The checkpoint of step 0 is there, and nothing after it."""
    flags = held_out(tiny_fit, *HARMFUL)
    whole = Run(tiny_fit.reference(*flags))
    (tmp_path / "checkpoints").mkdir()
    for path in [whole.folder / "recipe.yaml", *whole.folder.glob("checkpoints/step_00000000.*")]:
        shutil.copyfile(path, tmp_path / path.relative_to(whole.folder))
    finished = tiny_fit.run(tmp_path, *flags)
    assert finished.returncode == 0, finished.stderr
    assert [f["kept"] for f in fits(Run(tmp_path))] == ["start", "start"]
