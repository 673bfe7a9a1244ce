"""A run's layers are read only if they are whole, finite and where they belong; an export leaves a record of itself."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import socket
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from tiny_run import write_tiny_run

from bilinear_tc.train.errors import StorageError, UserError
from bilinear_tc.train.files import locked, written_whole
from bilinear_tc.train.run import Run
from bilinear_tc.upload.repository import UnfitRun, build_repository, check_publishable


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(write_tiny_run(tmp_path / "run"))


def change_weights(run: Run, layer: int, **changes: torch.Tensor | None) -> None:
    """Sets tensors of a layer's file; None takes one out."""
    path = run.layer_folder(layer) / "model.safetensors"
    tensors = load_file(path) | {name.replace("__", "."): value for name, value in changes.items()}
    save_file({name: value for name, value in tensors.items() if value is not None}, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"head__weight": None}, r"cannot be used \(missing keys: head.weight\)"),
        ({"input_std": None}, r"cannot be used \(missing keys: input_std\)"),
        ({"middle__weight": torch.ones(2)}, r"cannot be used \(unexpected keys: middle.weight\)"),
        ({"left__bias": torch.full((16,), torch.nan)}, r"cannot be used \(values not finite: left.bias\)"),
        ({"output_mean": torch.full((8,), torch.inf)}, r"cannot be used \(values not finite: output_mean\)"),
        ({"head__weight": torch.ones(8, 15)}, r"layer_1 of .* (does not load|cannot be used)"),
    ],
)
def test_a_layer_whose_weights_are_not_its_own_is_not_read(run: Run, changes: dict, sentence: str) -> None:
    change_weights(run, 1, **changes)
    run.load(0)
    with pytest.raises(UserError, match=sentence):
        run.load(1)


def test_layers_in_each_others_folders_are_not_read(run: Run) -> None:
    for old, new in (("layer_0", "aside"), ("layer_1", "layer_0"), ("aside", "layer_1")):
        (run.folder / old).rename(run.folder / new)
    with pytest.raises(UserError, match=r"layer_0 of .* says that it is layer 1"):
        run.load(0)


def export(run: Run, steps: int = 5) -> None:
    transcoders = [run.load(layer) for layer in run.layers]
    histories = [run.history(layer) for layer in run.layers]
    settings = [run.settings(layer) | {"fit": {"steps": steps}} for layer in run.layers]
    run.write_layers(transcoders, histories, settings, steps)


def test_an_export_is_known_by_its_record_and_by_every_file_of_it(run: Run) -> None:
    assert run.exported_step is None
    export(run)
    assert run.exported_step == 5
    record = json.loads((run.folder / "exported.json").read_text())
    assert set(record["sha256"]) == {
        f"layer_{layer}/{name}"
        for layer in (0, 1)
        for name in ("config.json", "config.yaml", "history.parquet", "model.safetensors")
    }
    settings = run.folder / "layer_1" / "config.yaml"
    settings.write_text(settings.read_text() + "\n")
    assert run.exported_step is None
    assert run.export_problems() == [
        "layer_1/config.yaml is missing, or not as it was written: run the fit's command again, which writes it from "
        "the checkpoint"
    ]


def test_what_an_export_did_not_end_or_was_changed_since_is_not_published(run: Run) -> None:
    check_publishable(run)
    (run.folder / "checkpoints" / "step_00000005.pt").touch()
    with pytest.raises(UnfitRun, match="the layers were not all written: run the fit's command again"):
        check_publishable(run)
    (run.folder / "checkpoints" / "exported").write_text("5")  # as earlier versions noted the end of an export
    check_publishable(run)
    export(run)
    assert not (run.folder / "checkpoints" / "exported").exists()
    check_publishable(Run(run.folder))
    change_weights(run, 0, left__bias=torch.zeros(16))
    with pytest.raises(UnfitRun, match=r"layer_0/model.safetensors is missing, or not as it was written"):
        check_publishable(Run(run.folder))


def test_a_set_is_finished_if_every_layer_has_all_steps(run: Run) -> None:
    assert run.is_finished
    export(run, steps=4)
    assert not Run(run.folder).is_finished


def test_files_reach_the_disk_before_they_get_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order = []
    monkeypatch.setattr("os.fsync", lambda descriptor: order.append("sync"))
    monkeypatch.setattr("os.replace", lambda old, new: order.append("rename"))
    target = tmp_path / "there"
    target.mkdir()
    with written_whole(target) as scratch:
        (scratch / "a").write_text("1")
        (scratch / "b").write_text("2")
    assert order == ["sync", "sync", "rename", "rename", "sync"]


def test_two_commands_do_not_work_in_one_folder(tmp_path: Path) -> None:
    with locked(tmp_path):
        with pytest.raises(UserError, match=rf"another command \(process {os.getpid()}\) is at work in {tmp_path}"):
            locked(tmp_path).__enter__()
        assert (tmp_path / ".lock").is_file()
    assert not (tmp_path / ".lock").exists()


@pytest.mark.parametrize(
    "left", ["", "{}", '{"host": "HOST", "pid": 1, "started": 0.5}', '{"host": "HOST", "pid": 4194305}']
)
def test_a_lock_whose_process_has_ended_is_passed_over(tmp_path: Path, left: str) -> None:
    (tmp_path / ".lock").write_text(left.replace("HOST", socket.gethostname()))
    with locked(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()


def test_a_lock_of_another_machine_is_believed(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text('{"host": "elsewhere", "pid": 12, "started": 0}')
    with pytest.raises(UserError, match=r"process 12 on elsewhere.* or delete .*\.lock if there is none"):
        locked(tmp_path).__enter__()


def change_config(run: Run, layer: int, **changes: object) -> None:
    path = run.layer_folder(layer) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"auto_map": {"AutoModel": "someone/else--modeling.Other"}}, "must name this package's two files as auto_map"),
        ({"auto_map": None}, "must name this package's two files as auto_map, got None"),
        ({"mlp_path": None}, "must name the MLP of layer 1 as mlp_path, got None"),
        ({"mlp_path": "gpt_neox.layers.0.mlp"}, "must name the MLP of layer 1 as mlp_path, got gpt_neox.layers.0.mlp"),
        ({"base_model": "a`b"}, "base must be a plain name, without line breaks, quotes and Markdown"),
        ({"base_revision": "main](http://evil)"}, "base_revision must be a plain name"),
    ],
)
def test_a_configuration_that_would_run_or_say_something_else_is_not_published(
    run: Run, changes: dict, sentence: str
) -> None:
    change_config(run, 1, **changes)
    with pytest.raises(UnfitRun, match=re.escape(sentence)):
        check_publishable(run)


def test_words_of_the_recipe_and_the_evaluation_are_plain(run: Run) -> None:
    evaluation = run.folder / "evaluation.json"
    evaluation.write_text(json.dumps(json.loads(evaluation.read_text()) | {"dataset": "a\n# Heading"}))
    recipe = run.folder / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("dataset: python-stdlib", "dataset: <script>"))
    with pytest.raises(UnfitRun) as caught:
        check_publishable(Run(run.folder))
    assert "recipe.yaml: dataset must be a plain name" in str(caught.value)
    assert "evaluation.json: dataset must be a plain name" in str(caught.value)


def test_a_link_that_leaves_the_run_is_refused_and_a_snapshots_links_are_followed(run: Run, tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("secret: true\n")
    settings = run.folder / "layer_0" / "config.yaml"
    kept = settings.read_bytes()
    settings.unlink()
    settings.symlink_to(mine)
    with pytest.raises(UnfitRun, match=r"layer_0/config.yaml is a link to .*mine.yaml, which is not the run's"):
        check_publishable(Run(run.folder))

    settings.unlink()
    settings.write_bytes(kept)
    snapshot, blobs = tmp_path / "cache" / "snapshots" / "abc", tmp_path / "cache" / "blobs"
    blobs.mkdir(parents=True)
    for number, file in enumerate(path for path in sorted(run.folder.rglob("*")) if path.is_file()):
        shutil.copyfile(file, blobs / str(number))
        link = snapshot / file.relative_to(run.folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blobs / str(number), link.parent))
    published = Run(snapshot)
    check_publishable(published)
    folder = build_repository(published, tmp_path / "repository")
    files = [path for path in folder.rglob("*") if path.is_file() or path.is_symlink()]
    assert not [path for path in files if path.is_symlink()]
    assert (folder / "layer_1" / "model.safetensors").read_bytes() == (
        run.folder / "layer_1" / "model.safetensors"
    ).read_bytes()


def test_a_folder_that_cannot_be_locked_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"missing cannot be written \(.*\): expected write permission"):
        locked(tmp_path / "missing").__enter__()


def test_a_file_that_the_hub_does_not_give_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run("nobody/nothing")
    run._remote_files = {"recipe.yaml"}
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"recipe.yaml of nobody/nothing cannot be fetched: "):
        _ = run.recipe


def test_a_folder_stays_if_the_new_one_cannot_take_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "set"
    target.mkdir()
    (target / "old").write_text("old")
    rename = os.rename

    def fail(source: Path, destination: Path) -> None:
        if (Path(source) / "new").exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        rename(source, destination)

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(ValueError, match="set cannot be written"), written_whole(target, replace=True) as scratch:
        (scratch / "new").write_text("new")
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["set", "set/old"]
