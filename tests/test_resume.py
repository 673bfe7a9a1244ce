"""A fit that is stopped, at whatever moment, and started again ends like one that never was."""

from __future__ import annotations

import json
import random
import shutil
import signal
from pathlib import Path

import pytest
import torch
import yaml
from fitting import TinyFit, assert_loads, assert_same_layers, checkpoints, layers, partial, write_text
from forking import wait_until


@pytest.mark.slow
def test_killed_at_ten_random_moments_it_ends_with_the_same_bits(tiny_fit: TinyFit, tmp_path: Path) -> None:
    """Three kills fall while a checkpoint is written or the oldest removed, two while layers are, the rest anywhere."""
    settings, run, chance = ("--max_steps", 96), tmp_path / "run", random.Random(0)
    moments = [
        *[("open", "step_", chance.uniform(0, 0.06)) for _ in range(4)],
        ("open", ".partial/step_", 0),
        ("os.rename", ".partial/step_", 0),
        ("os.remove", "checkpoints/step_", 0),
        ("open", f"layer_{chance.randrange(2)}.", 0),
        ("os.rename", f"layer_{chance.randrange(2)}/.", 0),
    ]
    chance.shuffle(moments)

    first = tiny_fit.start(run, *settings)
    wait_until(lambda: "closed form" in first.stderr)
    first.kill()
    assert first.wait().returncode == -signal.SIGKILL

    left = []
    for moment in moments:
        assert tiny_fit.run(run, *settings, sabotage=("die_at", *moment)).returncode == -signal.SIGKILL
        left += partial(run)
        if (run / "layer_1").exists():
            assert_loads(run)
    assert any(name.startswith("checkpoints/") for name in left)
    assert any("layer_" in name for name in left)

    finished = tiny_fit.run(run, *settings)
    assert finished.returncode == 0, finished.stderr
    assert "resuming" in finished.stdout
    assert_same_layers(run, tiny_fit.reference(*settings))
    assert partial(run) == []
    assert checkpoints(run) == [92, 96]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.slow
def test_asked_to_stop_it_saves_its_last_step(tiny_fit: TinyFit, tmp_path: Path, number: signal.Signals) -> None:
    """And goes on with the same bits where it would choose another micro-batch now, which adds up in another order."""
    settings, run = ("--max_steps", 96), tmp_path / "run"
    fit = tiny_fit.start(run, *settings)
    wait_until(lambda: checkpoints(run)[-1:] > [0])
    fit.kill(number)
    stopped = fit.wait()
    last = checkpoints(run)[-1]
    assert stopped.returncode == 1
    assert stopped.errors == [
        f"error: stopped after step {last} of 96, which is saved in {run}: run the same command to resume"
    ]
    assert [history.num_rows for _, history in layers(run).values()] == [last, last]
    assert_loads(run)

    finished = tiny_fit.run(run, *settings, sabotage=("choose_micro_batches_of", 3))
    assert f"resuming {run} after step {last} of 96" in finished.stdout
    assert "closed form" not in finished.stderr
    assert_same_layers(run, tiny_fit.reference(*settings))


@pytest.mark.slow
def test_wall_time_adds_up_over_resumes(tiny_fit: TinyFit, tmp_path: Path) -> None:
    """A checkpoint is dated back a thousand seconds, of which the resumed fit knows nothing else."""
    run = tmp_path / "run"
    assert tiny_fit.run(run, sabotage=("die_at", "os.rename", "step_00000012", "0")).returncode < 0
    newest = run / "checkpoints" / "step_00000008.pt"
    state = torch.load(newest)
    assert 0 < state["progress"]["seconds"] < 1000
    state["progress"]["seconds"] += 1000
    torch.save(state, newest)
    assert tiny_fit.run(run).returncode == 0
    facts = yaml.safe_load((run / "layer_0" / "config.yaml").read_text())["fit"]
    assert state["progress"]["seconds"] < facts["seconds"] < 2000
    assert (facts["steps"], facts["tokens"], facts["processes"]) == (24, (24 + 3) * 22 * 32, 1)


@pytest.mark.slow
def test_text_that_was_read_before_a_stop_and_has_changed_since_is_refused(tiny_fit: TinyFit, tmp_path: Path) -> None:
    settings, run = ("--max_steps", 96), tmp_path / "run"
    shard, *_ = write_text(tmp_path / "text")
    settings = (*settings, "--dataset", tmp_path / "text" / "*.jsonl")
    assert tiny_fit.run(run, *settings, sabotage=("die_at", "os.rename", "step_00000092", "0")).returncode < 0
    assert checkpoints(run) == [84, 88]
    before = shard.read_text()
    last = before.rindex("e")
    shard.write_text(f"{before[:last]}E{before[last + 1 :]}")
    refused = tiny_fit.run(run, *settings)
    (error,) = refused.errors
    assert "the position to resume from belongs to other text than" in error
    assert checkpoints(run) == [84, 88]
    shard.write_text(before)
    finished = tiny_fit.run(run, *settings)
    assert finished.returncode == 0, finished.stderr
    assert_same_layers(run, tiny_fit.reference("--max_steps", 96))


@pytest.mark.slow
def test_a_finished_run_only_prints_its_table(tiny_fit: TinyFit, tmp_path: Path) -> None:
    validation = tmp_path / "data"
    write_text(validation, shards=2)
    (validation / "shard-0.jsonl").rename(validation / "train.jsonl")
    (validation / "shard-1.jsonl").rename(validation / "validation.jsonl")
    run = tmp_path / "run"
    settings = ("--dataset", validation, "--max_steps", 4, "--eval_split", "validation", "--eval_tokens", 1500)
    first = tiny_fit.run(run, *settings)
    assert first.returncode == 0, first.stderr
    evaluation = json.loads((run / "evaluation.json").read_text())
    for layer in ("0", "1", "mean"):
        figures = evaluation["mean"] if layer == "mean" else evaluation["layers"][layer]
        assert f"{layer:>5}  {figures['fvu']:.4f} ±{figures['fvu_se']:.4f}" in first.stdout
    assert f'AutoModel.from_pretrained("{run}", subfolder="layer_0", trust_remote_code=True)' in first.stdout

    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    again = tiny_fit.run(run, *settings)
    assert (again.returncode, again.stdout, again.stderr) == (0, first.stdout, "")
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()} == before

    more = tiny_fit.run(run, *settings, "--eval_tokens", 3000)  # only measured anew
    assert (more.returncode, "closed form" in more.stderr) == (0, False)
    assert json.loads((run / "evaluation.json").read_text())["tokens"] > evaluation["tokens"]
    assert (run / "layer_0/model.safetensors").stat().st_mtime_ns == before[run / "layer_0/model.safetensors"]


@pytest.mark.slow
def test_killed_between_checkpoint_and_layers_it_writes_the_layers(tiny_fit: TinyFit, tmp_path: Path) -> None:
    """Also at the last step, after which there is nothing left to fit."""
    run = tmp_path / "run"
    assert tiny_fit.run(run, sabotage=("die_at", "os.remove", "step_00000016", "0")).returncode < 0
    assert checkpoints(run) == [16, 20, 24]
    assert [history.num_rows for _, history in layers(run).values()] == [20, 20]
    assert tiny_fit.run(run).returncode == 0
    assert_same_layers(run, tiny_fit.reference())


def test_killed_while_layers_are_first_written_each_is_whole_or_absent(tiny_fit: TinyFit, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert tiny_fit.run(run, sabotage=("die_at", "os.rename", "layer_1.", "0")).returncode < 0
    assert sorted(layers(run)) == ["layer_0"]
    assert_loads(run)
    assert [name for name in partial(run) if "layer_1" in name]


@pytest.mark.slow
def test_a_changed_recipe_is_refused_by_name(tiny_fit: TinyFit, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert tiny_fit.run(run, "--max_steps", 4).returncode == 0
    before = layers(run)
    refused = tiny_fit.run(run, "--max_steps", 8, "--lr", 0.5, "--report_to", "tensorboard", "--checkpoint_every", 3)
    assert refused.returncode == 1
    assert refused.errors == [
        f"error: {run} holds a run of another recipe (max_steps was 4, is 8; lr was 0.02, is 0.5): give the same "
        "settings to resume it, another --output_dir, or --no_resume to start it anew"
    ]
    assert layers(run) == before

    anew = tiny_fit.run(run, "--max_steps", 8, "--layers", 1, "--no_resume", "--overwrite")
    assert (anew.returncode, "resuming" in anew.stdout) == (0, False)
    assert sorted(layers(run)) == ["layer_1"]
    assert yaml.safe_load((run / "recipe.yaml").read_text())["max_steps"] == 8
    assert checkpoints(run) == [4, 8]


@pytest.mark.slow
def test_a_recipe_that_never_came_to_fit_may_be_changed(tiny_fit: TinyFit, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert tiny_fit.run(run, "--max_steps", 4, "--layers", 7).returncode == 1
    assert tiny_fit.run(run, "--max_steps", 4, "--layers", 1).returncode == 0


@pytest.mark.slow
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(tiny_fit: TinyFit, tmp_path: Path) -> None:
    """Where there is none before it, the fit does not start anew by itself."""
    run = tmp_path / "run"
    assert tiny_fit.run(run, sabotage=("die_at", "os.rename", "step_00000012", "0")).returncode < 0
    before, newest = (run / "checkpoints" / f"step_0000000{step}.pt" for step in (4, 8))
    whole = before.read_bytes()
    for path in (before, newest):
        path.write_bytes(path.read_bytes()[:1000])
    refused = tiny_fit.run(run)
    (error,) = refused.errors
    assert error.startswith(f"error: the checkpoint {before} cannot be read (")
    assert error.endswith("), and no earlier one is whole: start anew with --no_resume")

    before.write_bytes(whole)
    finished = tiny_fit.run(run)
    assert finished.returncode == 0
    assert f"WARNING: the checkpoint {newest} cannot be read (" in finished.stderr
    assert f"resuming {run} after step 4 of 24" in finished.stdout
    assert_same_layers(run, tiny_fit.reference())


def flipped(path: Path) -> bytes:
    """The file's content before one bit in its middle is turned over."""
    content = path.read_bytes()
    middle = len(content) // 2
    path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    return content


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["a bit", "another file"])
def test_a_checkpoint_that_is_not_as_written_is_passed_over(tiny_fit: TinyFit, tmp_path: Path, damage: str) -> None:
    run = tmp_path / "run"
    assert tiny_fit.run(run, sabotage=("die_at", "os.rename", ".partial/step_00000012", "0")).returncode < 0
    newest = run / "checkpoints" / "step_00000008.pt"
    if damage == "a bit":
        flipped(newest)
    else:
        torch.save({"weights": torch.zeros(3)}, newest)
    finished = tiny_fit.run(run)
    assert finished.returncode == 0
    assert f"WARNING: the checkpoint {newest} cannot be read (" in finished.stderr
    assert f"resuming {run} after step 4 of 24" in finished.stdout
    assert_same_layers(run, tiny_fit.reference())


@pytest.mark.slow
def test_a_finished_set_is_not_fitted_over(tiny_fit: TinyFit, tmp_path: Path) -> None:
    """Neither without its checkpoints, nor by --no_resume alone; and other people's files outlive even --overwrite."""
    run = tmp_path / "run"
    assert tiny_fit.run(run, "--max_steps", 4).returncode == 0
    before = layers(run)
    shutil.rmtree(run / "checkpoints")
    again = tiny_fit.run(run, "--max_steps", 4)
    assert (again.returncode, "closed form" in again.stderr) == (0, False)
    assert layers(run) == before

    refused = tiny_fit.run(run, "--max_steps", 4, "--no_resume")
    assert refused.errors == [
        f"error: {run} holds a finished set, which --no_resume would delete: name another --output_dir, or add "
        "--overwrite"
    ]
    assert layers(run) == before

    (run / "layer_0" / "notes.txt").write_text("mine")
    (run / "layer_notes").mkdir()
    (run / ".mine.partial").write_text("mine")
    anew = tiny_fit.run(run, "--max_steps", 8, "--layers", 1, "--no_resume", "--overwrite")
    assert anew.returncode == 0, anew.stderr
    assert sorted(path.name for path in run.glob("*layer_*")) == ["layer_0", "layer_1", "layer_notes"]
    assert [path.name for path in (run / "layer_0").iterdir()] == ["notes.txt"]
    assert (run / ".mine.partial").read_text() == "mine"


@pytest.mark.slow
def test_a_set_that_is_fitted_over_stays_until_the_new_one_is_whole(tiny_fit: TinyFit, tmp_path: Path) -> None:
    """Killed in its course, resumed by --overwrite alone, and killed again while the sets change places."""
    run = tmp_path / "run"
    assert tiny_fit.run(run, "--max_steps", 4, "--layers", 0).returncode == 0
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    over = ("--max_steps", 8, "--overwrite")
    killed = tiny_fit.run(run, *over, "--no_resume", sabotage=("die_at", "os.rename", ".partial/step_00000008", "0"))
    assert killed.returncode < 0
    assert before.items() <= {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}.items()
    assert tiny_fit.run(run, "--max_steps", 4, "--layers", 0).returncode == 0  # still a finished set

    moving = tiny_fit.run(run, *over, sabotage=("die_at", "os.rename", ".ready/layer_1/model", "0"))
    assert f"resuming {run}/.next after step 4 of 8" in moving.stdout
    assert moving.returncode < 0
    done = tiny_fit.run(run, *over)
    assert (done.returncode, "closed form" in done.stderr) == (0, False)
    assert_same_layers(run, tiny_fit.reference("--max_steps", 8))
    assert checkpoints(run) == [4, 8]
    assert sorted(path.name for path in run.iterdir() if path.name.startswith(".")) == []


@pytest.mark.slow
def test_layers_of_an_unfinished_fit_without_checkpoints_are_not_fitted_over(tiny_fit: TinyFit, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert tiny_fit.run(run, sabotage=("die_at", "os.rename", ".partial/step_00000012", "0")).returncode < 0
    shutil.rmtree(run / "checkpoints")
    (error,) = tiny_fit.run(run).errors
    assert error.startswith(f"error: {run} holds layers that are not fitted to the end, and no checkpoint to resume")


@pytest.mark.slow
def test_a_finished_set_that_was_damaged_is_written_again_or_named(tiny_fit: TinyFit, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert tiny_fit.run(run).returncode == 0
    weights = [run / f"layer_{layer}" / "model.safetensors" for layer in (0, 1)]
    whole = [path.read_bytes() for path in weights]

    def swap() -> None:
        for path, content in zip(weights, reversed(whole), strict=True):
            path.write_bytes(content)

    for damage in (lambda: flipped(weights[0]), weights[1].unlink, swap):
        damage()
        mended = tiny_fit.run(run)
        assert mended.returncode == 0, mended.stderr
        assert [path.read_bytes() for path in weights] == whole
    shutil.rmtree(run / "checkpoints")
    swap()
    (error,) = tiny_fit.run(run).errors
    assert "holds a finished set that is damaged, and no checkpoint" in error
    assert "model.safetensors is missing, or not as it was written" in error, error
