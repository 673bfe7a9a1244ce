"""The joint finish: its gradients, its stage of a run, and what it says of the set that it leaves."""

from __future__ import annotations

import copy
import dataclasses
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from bases import tiny_llama, tiny_neox
from fitting import TinyFit, assert_same_layers, checkpoints, layers, partial
from safetensors.torch import load
from test_start import held_out
from tiny_run import write_tiny_run
from torch import Tensor
from torch.nn.functional import kl_div

from bilinear_tc.modeling_bilinear_tc import BilinearTC
from bilinear_tc.train import fit
from bilinear_tc.train.base import Base
from bilinear_tc.train.errors import UserError
from bilinear_tc.train.files import write_yaml
from bilinear_tc.train.finish import check_source
from bilinear_tc.train.fitting import joint
from bilinear_tc.train.fitting.fitter import make_transcoders
from bilinear_tc.train.fitting.joint import JointFitter, divergence
from bilinear_tc.train.measuring.replacement import transcoders_attached
from bilinear_tc.train.recipe import Recipe, parse_recipe
from bilinear_tc.train.run import Run
from bilinear_tc.train.start import start_of
from bilinear_tc.train.text.batches import TokenBatch

CPU = torch.device("cpu")
RECIPE: dict[str, Any] = {
    **{"finish": "joint", "finish_steps": 4, "finish_lr": 1e-9, "anchor": 0.7, "jvp": 0.3},
    **{"batch_size": 5, "seq_len": 8, "hidden_multiplier": 1.5, "init_tokens": 40},
}
FINISH = ("--finish", "joint", "--finish_steps", 12)
HARMFUL = ("--finish_lr", 3.0)


def some_transcoders(recipe: Recipe, base: Base) -> list[BilinearTC]:
    transcoders = make_transcoders(recipe, base, CPU)
    torch.manual_seed(2)
    for transcoder in transcoders:
        for name in ("input", "output"):
            getattr(transcoder, f"{name}_mean").normal_()
            getattr(transcoder, f"{name}_std").uniform_(0.5, 2)
    return transcoders


def a_batch() -> TokenBatch:
    mask = torch.ones(5, 8, dtype=torch.bool)
    mask[1, 3:], mask[4, 1:] = False, False
    return TokenBatch(torch.randint(50, (5, 8), generator=torch.Generator().manual_seed(3)), mask)


def gradients(fitter: JointFitter, batch: TokenBatch) -> dict[str, Tensor]:
    fitter.step(batch, 0)
    return {name: p.grad.clone() for name, p in fitter.stack.parameters.items() if p.grad is not None}


@pytest.mark.parametrize("model", [tiny_neox, tiny_llama])
@pytest.mark.parametrize("of_layers", [None, [0, 2]])
def test_the_gradient_of_the_whole_loss_is_autograds_in_float64(model: Any, of_layers: list[int] | None) -> None:
    recipe, batch = Recipe(**RECIPE), a_batch()
    base = Base(model(), None, of_layers)
    transcoders = some_transcoders(recipe, base)
    references, twin = [copy.deepcopy(t).double() for t in transcoders], Base(model().double(), None, of_layers)
    fitter = JointFitter(recipe, transcoders, base, CPU)
    found = gradients(fitter, batch)

    kept, flows = batch.mask, twin.activations(batch.input_ids)
    true = twin.model(batch.input_ids).logits[kept].log_softmax(-1)
    with transcoders_attached(twin, references):
        own = twin.model(batch.input_ids).logits[kept].log_softmax(-1)
    kl = kl_div(own, true, log_target=True, reduction="sum") / kept.sum()
    loss, mse = kl, []
    fitter.tangents.begin(0, fitter.activations)
    for index, (tc, weights) in enumerate(zip(references, fitter.activations.weights.double(), strict=True)):
        x, y = (of[kept] for of in flows[base.layers[index]])
        scored, z = (x - tc.input_mean) / tc.input_std, (y - tc.output_mean) / tc.output_std
        mse.append((weights[:, None] * (tc.normalized_forward(scored) - z).square()).mean())
        stds = tc.input_std.float(), tc.output_std.float()
        directions, changes = fitter.tangents.draw(index, x[::4].float(), *stds)
        _, along = torch.func.jvp(tc.normalized_forward, (scored[::4],), (directions.double(),))
        turned = (weights[::4, None] * (along - changes.double()).square()).mean()
        loss = loss + 0.7 * (mse[-1] + 0.3 * turned)
    loss.backward()
    assert fitter.shown["kl"] == pytest.approx(kl.item(), rel=1e-4)
    for name, gradient in found.items():
        expected = torch.stack([tc.get_parameter(name).grad for tc in references])
        torch.testing.assert_close(gradient.double(), expected, rtol=1e-3, atol=1e-5 * expected.abs().max(), msg=name)


def test_the_divergence_of_two_rows_of_logits_and_its_gradient() -> None:
    true, own = 3 * torch.randn(2, 7, 30, generator=torch.Generator().manual_seed(0))
    reference = own.double().requires_grad_()
    expected = kl_div(reference.log_softmax(-1), true.double().softmax(-1), reduction="sum")
    expected.backward()
    kl, gradient = divergence(true, own)
    assert kl.item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(gradient.double(), reference.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("change", ["parts", "logits", "recomputed"])
def test_parts_of_a_batch_parts_of_the_logits_and_recomputed_blocks_change_nothing(
    monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    recipe, base = Recipe(**RECIPE), Base(tiny_neox(), None)
    transcoders = some_transcoders(recipe, base)
    whole, other = (JointFitter(recipe, copy.deepcopy(transcoders), base, CPU) for _ in range(2))
    whole.micro_batch_size, other.micro_batch_size = 5, 2 if change == "parts" else 5
    expected, kl = gradients(whole, a_batch()), whole.shown["kl"]
    other.recompute = change == "recomputed"
    if change == "logits":
        monkeypatch.setattr(joint, "LOGITS", 150)  # three rows of 50
        monkeypatch.setattr(joint, "LEAST_ROWS", 1)
    found = gradients(other, a_batch())
    assert other.shown["kl"] == pytest.approx(kl, rel=1e-5)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-6, msg=name)


def test_logits_exist_in_parts_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    base, most = Base(tiny_neox(vocab_size=3000), None), []
    monkeypatch.setattr(joint, "LOGITS", 12_000)
    monkeypatch.setattr(joint, "LEAST_ROWS", 1)
    recipe = Recipe(**RECIPE)
    fitter = JointFitter(recipe, some_transcoders(recipe, base), base, CPU)
    base.model.get_output_embeddings().register_forward_hook(lambda _m, _i, logits: most.append(logits.numel()))
    fitter.step(TokenBatch(torch.randint(3000, (5, 8))), 0)
    assert max(most) == 12_000


def test_a_layer_that_is_nearly_exact_steps_less(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, base = Recipe(**RECIPE | {"finish_lr": 0.01}), Base(tiny_neox(), None)
    transcoders = some_transcoders(recipe, base)
    transcoders[0].output_mean[:], transcoders[0].output_std[:] = 0, 1e4  # whose errors are none to these outputs
    transcoders[0].head.weight.data.zero_()
    paced, plain = (JointFitter(recipe, copy.deepcopy(transcoders), base, CPU) for _ in range(2))
    before = {name: p.detach().clone() for name, p in paced.stack.parameters.items()}
    monkeypatch.setattr(plain, "_update", lambda number, _fvu: plain.update(number))
    _, fvu, _ = paced.step(a_batch(), 0)
    plain.step(a_batch(), 0)
    for layer, pace in enumerate((fvu / fvu.mean()).sqrt().clamp(max=1).tolist()):
        for name, start in before.items():
            long, short = (of.stack.parameters[name][layer] - start[layer] for of in (plain, paced))
            torch.testing.assert_close(short, pace * long, rtol=1e-3, atol=1e-7)
    assert fvu.min() < 0.5 * fvu.mean()


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"finish": "joint", "finish_steps": 0}, "finish_steps must be at least 1, got 0"),
        ({"finish": "joint", "seq_len": 1}, "seq_len must be at least 2 with --finish joint, got 1"),
        ({"finish": "joint", "finish_lr": 0.0}, "finish_lr must be a positive number"),
        ({"finish": "joint", "dtype": "float16"}, "use bfloat16"),
        ({"finish": "joint", "base_dtype": "float16"}, "base_dtype float16 has too small a range"),
        ({"finish": "joint", "base_device_map": "auto"}, "and --base_device_map none"),
        ({"finish": "joint", "anchor": -1.0}, "anchor must be a finite number of at least 0"),
        ({"from_run": "runs/x"}, "add --finish joint"),
        ({"finish_steps": 3}, "add --finish joint"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        Recipe(**settings)


def test_a_run_whose_layers_were_shared_out_is_finished_too(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(Recipe(shard="layers").to_dict()))
    assert parse_recipe(["--finish", "joint", "--from", str(tmp_path)]).shard == "auto"


def test_its_output_lies_beside_its_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run").mkdir()
    write_yaml({}, tmp_path / "run" / "recipe.yaml")
    monkeypatch.chdir(tmp_path / "run")
    for source, expected in (
        (f"{tmp_path}/run/", tmp_path / "run-joint"),
        (".", tmp_path / "run-joint"),
        ("../run", "../run-joint"),
    ):
        assert parse_recipe(["--finish", "joint", "--from", source]).output_dir == str(expected)


@pytest.fixture(scope="module")
def source(tiny_fit: TinyFit) -> Path:
    """A finished layer-wise run of 24 steps, measured on held-out text."""
    return tiny_fit.reference(*held_out(tiny_fit))


@pytest.fixture(scope="module")
def finished(tiny_fit: TinyFit, source: Path) -> Path:
    """The run of its joint finish."""
    return tiny_fit.reference(*held_out(tiny_fit), *FINISH, "--from", source)


def stages(run: Path) -> list[dict[str, Any]]:
    return [yaml.safe_load((run / name / "config.yaml").read_text()) for name in layers(run)]


def test_a_set_that_was_killed_before_it_was_compared_is_not_finished(tmp_path: Path) -> None:
    """Though train/evaluate.py has measured it since."""
    run = Run(write_tiny_run(tmp_path))
    recipe = dataclasses.replace(run.recipe, finish="joint", finish_steps=2)
    run.write_root(recipe.to_dict())
    for stage, finished in (({"steps": 2}, False), ({"steps": 2, "before": {}}, True)):
        for layer in run.layers:
            write_yaml(run.settings(layer) | {"joint": stage}, run.layer_folder(layer) / "config.yaml")
        (tmp_path / "checkpoints" / "step_00000002.pt").touch()
        run.note_export(2)
        run.forget()
        assert fit.is_finished(run, recipe) == finished
        (tmp_path / "checkpoints" / "step_00000002.pt").unlink()
        if not finished:
            with pytest.raises(UserError, match=r"no checkpoint to go on from: measure it with train/evaluate.py"):
                fit.is_finished(run, recipe)


def test_a_layer_wise_set_that_was_killed_before_it_was_compared_is_no_source(tmp_path: Path) -> None:
    """Nor is it finished: a layer that its steps have harmed is still to be put back."""
    run = Run(write_tiny_run(tmp_path))
    start = start_of(run)
    for layer in run.layers:
        shutil.copytree(run.layer_folder(layer), start.layer_folder(layer))
    start.note_export(0)
    run.note_export(5)
    (tmp_path / "checkpoints" / "step_00000005.pt").touch()
    joint = dataclasses.replace(run.recipe, finish="joint", output_dir="elsewhere")
    assert not fit.is_finished(run, run.recipe)
    with pytest.raises(UserError, match=r"is no finished run of a layer-wise fit: let train/fit.py end it first"):
        check_source(run, joint)
    for layer in run.layers:
        settings = run.settings(layer)
        write_yaml(settings | {"fit": settings["fit"] | {"kept": "end"}}, run.layer_folder(layer) / "config.yaml")
    run.note_export(5)
    run.forget()
    assert fit.is_finished(run, run.recipe)
    check_source(run, joint)


@pytest.mark.slow
def test_it_begins_with_the_set_that_its_source_holds_and_with_no_other(
    tiny_fit: TinyFit, source: Path, tmp_path: Path
) -> None:
    other, place, run = tiny_fit.reference(*held_out(tiny_fit), "--seed", 1), tmp_path / "source", tmp_path / "run"
    flags = (*held_out(tiny_fit), *FINISH, "--finish_steps", 1, "--from", place)
    for held, sabotage in ((source, ("die_at", "os.rename", ".partial/step_00000000", "0")), (other, ())):
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(held, place)
        assert (tiny_fit.run(run, *flags, sabotage=sabotage).returncode == 0) == (not sabotage)
        assert_same_layers(run / "checkpoints" / "start", held)
    before = layers(run)
    shutil.rmtree(place)
    shutil.copytree(source, place)
    (error,) = tiny_fit.run(run, *flags).errors
    assert f"{place} holds another layer_0 now than {run} began with: name another --output_dir" in error
    assert layers(run) == before
    anew = tiny_fit.run(run, *flags, "--no_resume", "--overwrite")
    assert anew.returncode == 0, anew.stderr
    assert_same_layers(run / "checkpoints" / "start", source)


@pytest.mark.slow
def test_a_finished_run_is_where_it_starts_and_stays_as_it_is(tiny_fit: TinyFit, source: Path, tmp_path: Path) -> None:
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in source.rglob("*") if path.is_file()}
    flags = ["--from", source, "--finish", "joint", "--output_dir", tmp_path / "run", "--layers", 1]
    ended = tiny_fit.server.start(fit.main, [*flags, "--eval_split", "none"]).wait()
    assert ended.returncode == 0, ended.stderr
    assert {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in source.rglob("*") if p.is_file()} == before
    (of_layer,) = stages(tmp_path / "run")
    before_it, stage = of_layer["fit"], of_layer["joint"]
    assert (of_layer["stage"], of_layer["layer"]) == ("joint", 1)
    assert before_it == stages(source)[1]["fit"]
    assert stage["steps"] == before_it["tokens"] // (22 * 32)  # no more tokens than the fit took
    assert stage["tokens"] == stage["steps"] * 22 * 32 <= before_it["tokens"]
    assert (stage["anchor"], stage["lr"]) == (Recipe().anchor, 0.005)
    history = Run(tmp_path / "run").history(1)
    assert list(history["step"]) == list(range(1, 24 + stage["steps"] + 1))
    assert history["tokens"][-1] == before_it["tokens"] + stage["tokens"]
    assert "fitted 1 layers" in ended.stdout


@pytest.mark.slow
def test_it_says_what_the_set_was_before_and_after(tiny_fit: TinyFit, source: Path, finished: Path) -> None:
    run = Run(finished)
    assert run.is_finished
    assert [of_layer["stage"] for of_layer in stages(source)] == ["layer-wise", "layer-wise"]
    for layer, of_layer in enumerate(stages(finished)):
        before, after = of_layer["joint"]["before"], of_layer["joint"]["after"]
        assert of_layer["joint"]["kept"] == "end"
        assert after["kl"] < before["kl"]
        assert before["fvu"] == pytest.approx(Run(source).evaluation.layers[layer].fvu, rel=1e-6)
        assert after["fvu"] == pytest.approx(run.evaluation.layers[layer].fvu, rel=1e-6)
        assert after["mean_fvu"] == pytest.approx(run.evaluation.mean("fvu"), rel=1e-6)
    again = tiny_fit.run(finished, *held_out(tiny_fit), *FINISH, "--from", source)
    assert again.returncode == 0, again.stderr
    for name in ("before", "after"):
        assert f"{name[:6]}" in again.stdout
        assert f"{stages(finished)[0]['joint'][name]['kl']:.4f}" in again.stdout


@pytest.mark.slow
def test_a_set_that_its_steps_harm_is_put_back_whole(tiny_fit: TinyFit, source: Path, tmp_path: Path) -> None:
    flags = (*held_out(tiny_fit), *FINISH, *HARMFUL, "--from", source)
    ended = tiny_fit.run(tmp_path, *flags)
    assert "The set is as it was before: the steps ended with a higher KL." in ended.stdout
    assert [of_layer["joint"]["kept"] for of_layer in stages(tmp_path)] == ["start", "start"]
    for name, (weights, _) in layers(tmp_path).items():
        assert weights == layers(source)[name][0]
    (tmp_path / "evaluation.json").unlink()  # measured anew, it stays so
    worse = stages(tmp_path)[0]["joint"]["after"]
    assert tiny_fit.run(tmp_path, *flags).returncode == 0
    assert [of_layer["joint"]["kept"] for of_layer in stages(tmp_path)] == ["start", "start"]
    assert stages(tmp_path)[0]["joint"]["after"] == worse
    elsewhere = tiny_fit.run(tmp_path, *flags, "--eval_tokens", 4224)  # and of another text there is no measure of it
    assert elsewhere.returncode == 0, elsewhere.stderr
    assert "after" not in stages(tmp_path)[0]["joint"]
    assert [line.split()[0] for line in elsewhere.stdout.splitlines() if line.startswith(("before", "after"))] == [
        "before"
    ]


@pytest.mark.slow
def test_killed_in_mid_stage_it_ends_with_the_same_bits(
    tiny_fit: TinyFit, source: Path, finished: Path, tmp_path: Path
) -> None:
    """While a checkpoint is written, and while layers are."""
    flags = (*held_out(tiny_fit), *FINISH, "--from", source)
    for moment in (("os.rename", ".partial/step_00000008"), ("os.rename", "layer_1/.")):
        killed = tiny_fit.run(tmp_path, *flags, sabotage=("die_at", *moment, "0"))
        assert killed.returncode == -signal.SIGKILL
    resumed = tiny_fit.run(tmp_path, *flags)
    assert resumed.returncode == 0, resumed.stderr
    assert f"resuming {tmp_path} after step" in resumed.stdout
    assert_same_layers(tmp_path, finished)
    assert stages(tmp_path)[0]["joint"]["after"] == stages(finished)[0]["joint"]["after"]
    assert (partial(tmp_path), checkpoints(tmp_path)) == ([], [8, 12])


@pytest.mark.slow
def test_one_command_does_both_and_keeps_the_layer_wise_run(
    tiny_fit: TinyFit, source: Path, finished: Path, tmp_path: Path
) -> None:
    flags = (*held_out(tiny_fit), *FINISH)
    killed = tiny_fit.run(tmp_path, *flags, sabotage=("die_at", "os.rename", f"{tmp_path}/checkpoints/.", "0"))
    assert killed.returncode == -signal.SIGKILL
    ended = tiny_fit.run(tmp_path, *flags)
    assert (ended.returncode, "closed form" in ended.stderr) == (0, False)
    assert_same_layers(tmp_path, finished)
    assert_same_layers(tmp_path / "layer-wise", source)
    assert Run(tmp_path / "layer-wise").is_finished
    anew = tiny_fit.run(tmp_path, *flags, "--no_resume", "--overwrite", "--layers", 1)
    assert anew.returncode == 0, anew.stderr
    assert sorted(layers(tmp_path)) == sorted(layers(tmp_path / "layer-wise")) == ["layer_1"]


@pytest.mark.slow
def test_a_layer_wise_fit_that_was_cut_short_is_begun_anew(tiny_fit: TinyFit, tmp_path: Path) -> None:
    flags = ("--finish", "joint", "--finish_steps", 1, "--max_steps", 5)
    killed = tiny_fit.run(tmp_path, *flags, sabotage=("die_at", "os.rename", ".partial/step_00000004", "0"))
    assert killed.returncode == -signal.SIGKILL
    anew = tiny_fit.run(tmp_path, *flags, "--no_resume", "--layers", 1)
    assert anew.returncode == 0, anew.stderr
    assert 'subfolder="layer_1"' in anew.stdout


@pytest.mark.slow
def test_two_processes_end_where_one_does_both_stages_in_one_command(
    tiny_fit: TinyFit, finished: Path, tmp_path: Path
) -> None:
    for process in tiny_fit.start_processes(2, tmp_path, *held_out(tiny_fit), *FINISH):
        ended = process.wait()
        assert ended.returncode == 0, ended.stderr
    for name, (weights, history) in layers(tmp_path).items():
        of_one, expected = layers(finished)[name]
        tensors = load(of_one)
        for key, tensor in load(weights).items():
            torch.testing.assert_close(tensor, tensors[key], rtol=1e-3, atol=1e-4)
        assert history["fvu"].to_pylist() == pytest.approx(expected["fvu"].to_pylist(), rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--hidden_multiplier", 2), "was fitted with hidden_multiplier 4.0, not 2.0"),
        (("--base", "train/quickstart"), "was fitted with base"),
        (("--max_steps", 3), "was fitted with max_steps 24, not 3"),
    ],
)
def test_a_run_of_another_fit_is_refused(
    tiny_fit: TinyFit, tmp_path: Path, flags: tuple[object, ...], sentence: str
) -> None:
    source = tiny_fit.reference()
    (error,) = tiny_fit.run(tmp_path, *FINISH, "--from", source, *flags).errors
    assert sentence in error
    assert layers(tmp_path) == {}


@pytest.mark.slow
def test_a_run_that_is_not_finished_or_lacks_layers_is_refused(tiny_fit: TinyFit, tmp_path: Path) -> None:
    source = tiny_fit.reference()
    (error,) = tiny_fit.run(tmp_path / "a", *FINISH, "--from", tmp_path / "nowhere").errors
    assert f"{tmp_path}/nowhere is not a folder: expected a run" in error
    with pytest.raises(UserError, match=r"holds no recipe.yaml: expected a finished run"):
        parse_recipe(["--finish", "joint", "--from", str(tmp_path)])
    shutil.copytree(source, tmp_path / "source")
    shutil.rmtree(tmp_path / "source" / "layer_1")
    Run(tmp_path / "source").note_export(24)
    (error,) = tiny_fit.run(tmp_path / "b", *FINISH, "--from", tmp_path / "source").errors
    assert "holds no layers 1: name those that it holds with --layers" in error
    (tmp_path / "source" / "layer_0" / "model.safetensors").write_bytes(b"")
    (error,) = tiny_fit.run(tmp_path / "c", *FINISH, "--from", tmp_path / "source", "--layers", 0).errors
    assert "is no finished run of a layer-wise fit" in error
    (error,) = tiny_fit.run(source, *FINISH).errors
    assert error.endswith(f"holds a layer-wise fit: go on from it with --from {source}")
    (error,) = tiny_fit.run(source, *FINISH, "--from", source, "--no_resume", "--overwrite").errors
    assert "is the output_dir too: name another --output_dir" in error
