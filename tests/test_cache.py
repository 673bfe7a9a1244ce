"""Activations that are computed once and read often: fits from them are the fits that run the base."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from fitting import TinyFit, assert_same_layers
from forking import Finished
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from bilinear_tc.train import cache
from bilinear_tc.train.base import Base
from bilinear_tc.train.errors import UserError
from bilinear_tc.train.recipe import Recipe
from bilinear_tc.train.recording import Recording, digest_of

pytestmark = pytest.mark.slow  # all fit, or record a base
SHORT = ("--max_steps", 3, "--layers", 1, "--eval_tokens", 1500)


@pytest.fixture(scope="module")
def held_out(tiny_fit: TinyFit) -> tuple[object, ...]:
    """Flags of a fit that is measured on a shard that it does not read."""
    shards = [str(tiny_fit.text / f"shard-{number}.jsonl") for number in range(5)]
    return (*SHORT, "--dataset", ",".join(shards), "--eval_split", tiny_fit.text / "shard-5.jsonl")


def write(tiny_fit: TinyFit, folder: Path, *more: object, processes: int = 1, sabotage=()) -> Finished:
    arguments = tiny_fit.flags(Path("unused"), "--activations", folder, *more)
    if processes > 1:
        started = tiny_fit.server.start_processes(processes, cache.main, arguments, sabotage=sabotage)
        return max((process.wait() for process in started), key=lambda finished: finished.returncode)
    return tiny_fit.server.start(cache.main, arguments, sabotage=sabotage).wait()


@pytest.fixture(scope="module")
def written(tiny_fit: TinyFit, held_out, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache") / "activations"
    finished = write(tiny_fit, folder, *held_out)
    assert finished.returncode == 0, finished.stderr
    return folder


def refused(tiny_fit: TinyFit, tmp_path: Path, *more: object) -> str:
    """The sentence of a fit that does not begin."""
    finished = tiny_fit.run(tmp_path / "refused", *more)
    assert finished.returncode == 1
    assert not (tmp_path / "refused" / "recipe.yaml").exists()
    return finished.stderr.strip().splitlines()[-1]


def test_a_fit_from_them_is_the_fit_that_runs_the_base(tiny_fit, written, held_out, tmp_path):
    """Weights, histories and evaluation to the bit, with the derivative in the loss; and the base makes no pass but
    the few that only it can: the check's and the measures' of reading."""
    reference = tiny_fit.reference(*held_out)
    finished = tiny_fit.run(tmp_path / "run", *held_out, "--activations", written, sabotage=["count_passes"])
    assert finished.returncode == 0, finished.stderr
    assert_same_layers(tmp_path / "run", reference)
    ours, theirs = (json.loads((run / "evaluation.json").read_text()) for run in (tmp_path / "run", reference))
    assert ours == theirs
    assert "activations" not in (tmp_path / "run" / "recipe.yaml").read_text()
    passes = [line for line in finished.stdout.splitlines() if line == "a pass of the base"]
    assert 1 <= len(passes) <= 4


def test_what_is_written_is_what_the_base_says(tiny_fit, written):
    """Of each sequence, at its place in the text."""
    base = Base(AutoModelForCausalLM.from_pretrained(tiny_fit.base), None, [1])
    tensors = load_file(written / "fit-000001-0of1.safetensors")
    assert tensors["sequences"].tolist() == list(range(22, 44))
    ((_, (x, y)),) = base.activations(tensors["input_ids"].long()).items()
    torch.testing.assert_close(tensors["x.1"], x)
    torch.testing.assert_close(tensors["y.1"], y)


def test_a_cache_that_was_cut_short_goes_on(tiny_fit, written, held_out, tmp_path):
    """What is there is not made anew; a fit that comes too early says what to run."""
    folder = tmp_path / "cut"
    shutil.copytree(written, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"batches": {"fit": 0, "held_out": 0}}))
    (folder / "fit-000002-0of1.safetensors").unlink()
    kept = folder / "fit-000001-0of1.safetensors"
    before = kept.stat().st_mtime_ns
    said = refused(tiny_fit, tmp_path, *held_out, "--activations", folder)
    assert "holds 0 of the 6 batches of the fit text: run train/cache.py" in said
    assert write(tiny_fit, folder, *held_out).returncode == 0
    assert kept.stat().st_mtime_ns == before
    for path in written.iterdir():
        assert (folder / path.name).read_bytes() == path.read_bytes()


def test_processes_write_their_shares(tiny_fit, held_out, tmp_path):
    """A fit in one process reads what two have written."""
    unmeasured = (*held_out, "--eval_split", "none")
    finished = write(tiny_fit, tmp_path / "two", *unmeasured, processes=2)
    assert finished.returncode == 0, finished.stderr
    assert len([*(tmp_path / "two").glob("fit-000000-*of2.safetensors")]) == 2
    finished = tiny_fit.run(tmp_path / "run", *unmeasured, "--activations", tmp_path / "two")
    assert finished.returncode == 0, finished.stderr


def test_a_process_may_have_no_sequence_of_a_batch(tiny_fit, held_out, tmp_path):
    """Of one sequence a batch one process has none; two that read it measure what one does that runs the base."""
    flags = (*held_out, "--batch_size", 1, "--no_pack", "--init_tokens", 256, "--eval_tokens", 256)
    finished = write(tiny_fit, tmp_path / "two", *flags, processes=2)
    assert finished.returncode == 0, finished.stderr
    for process in tiny_fit.start_processes(2, tmp_path / "run", *flags, "--activations", tmp_path / "two"):
        assert (finished := process.wait()).returncode == 0, finished.stderr
    runs = (tmp_path / "run", tiny_fit.reference(*flags))
    ours, theirs = (json.loads((run / "evaluation.json").read_text())["layers"]["1"] for run in runs)
    for name in ("fvu", "fvu_raw", "fvu_linear", "jacobian_cosine"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-3)


def test_a_token_that_the_base_has_not_is_said(tiny_fit, held_out, tmp_path):
    """As by a fit."""
    finished = write(tiny_fit, tmp_path / "cache", *held_out, "--bos", 99999)
    said = "error: expected the base's own tokenizer, got the token 99999 for an embedding of 2048 rows"
    assert finished.errors == [said]


def test_a_cache_whose_files_are_gone_is_refused(tiny_fit, written, held_out, tmp_path):
    shutil.copytree(written, tmp_path / "cache", ignore=shutil.ignore_patterns("*.safetensors"))
    said = refused(tiny_fit, tmp_path, *held_out, "--activations", tmp_path / "cache")
    assert "holds a manifest.json alone: expected activations beside it; write it anew" in said


def test_a_fit_of_something_else_is_refused(tiny_fit, written, held_out, tmp_path):
    for more, said in (
        (("--seq_len", 16), "seq_len was 32, is 16"),
        (("--seed", 1), "seed was 0, is 1"),
        (("--bos", "3"), "bos was none, is 3"),
        (("--dtype", "bfloat16"), "dtype was float32, is bfloat16"),
        (("--layers", "0-1"), "layers were [1], are [0, 1]"),
        (("--max_steps", 9), "holds 6 of the 12 batches of the fit text"),
    ):
        assert said in refused(tiny_fit, tmp_path, *held_out, *more, "--activations", written)
    nothing = tmp_path / "nothing"
    assert "holds no activations" in refused(tiny_fit, tmp_path, *held_out, "--activations", nothing)


def test_what_another_packing_gave_or_an_earlier_version_wrote_is_refused(neox, tmp_path):
    recipe = Recipe(activations=str(tmp_path), bos="none")
    Recording(recipe, neox).note({})
    packed = Recording(dataclasses.replace(recipe, base_quantization="int8"), neox)
    with pytest.raises(UserError, match="base_quantization was none, is int8"):
        packed.check_manifest()
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    del manifest["made_from"]["bos"]
    manifest["sha256"] = digest_of(manifest["made_from"])
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="bos was None, is none"):
        Recording(recipe, neox).check_manifest()


def test_a_base_whose_weights_have_changed_is_refused(tiny_fit, written, held_out, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(tiny_fit.base, base)
    weights = load_file(base / "model.safetensors")
    weights["gpt_neox.layers.1.mlp.dense_h_to_4h.weight"] *= 1.5
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    folder = tmp_path / "cache"
    shutil.copytree(written, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["made_from"]["base"] = str(base)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    flags = (*held_out, "--base", base, "--activations", folder)
    assert "its hash is of something else" in refused(tiny_fit, tmp_path, *flags)
    manifest["sha256"] = digest_of(manifest["made_from"])
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert "holds other outputs of layer 1's MLP" in refused(tiny_fit, tmp_path, *flags)


def test_a_disk_that_is_too_small(tiny_fit, held_out, tmp_path):
    """Said, with the size, before the base runs."""
    finished = write(tiny_fit, tmp_path / "cache", *held_out, sabotage=["small_disk"])
    assert finished.returncode == 1
    assert "0.001 GB for 1 layers" in finished.stdout
    assert "but its disk has 0.00 GB free" in finished.stderr
    assert not [*(tmp_path / "cache").glob("*.safetensors")]
