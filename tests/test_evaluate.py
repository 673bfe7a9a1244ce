"""The evaluator against a slow float64 loop, and against the base itself."""

from __future__ import annotations

import copy
import json
import shutil

import pytest
import torch
from torch.nn.functional import log_softmax

from bilinear_tc.modeling_bilinear_tc import BilinearTC
from bilinear_tc.train import evaluate
from bilinear_tc.train.activations import Activations
from bilinear_tc.train.fitting.fitter import make_transcoders
from bilinear_tc.train.measuring.affine import solve_affine
from bilinear_tc.train.measuring.held_out import measure, measure_held_out
from bilinear_tc.train.measuring.reconstruction import Reconstruction
from bilinear_tc.train.measuring.replacement import Replacement
from bilinear_tc.train.measuring.tables import loss_table
from bilinear_tc.train.recipe import Recipe
from bilinear_tc.train.run import Run
from bilinear_tc.train.text.batches import TokenBatch

CPU = torch.device("cpu")
LOSS_KEYS = ("ce_increase", "kl", "top1", "loss_recovered")


def held_out(padded: bool) -> list[TokenBatch]:
    generator = torch.Generator().manual_seed(5)
    batches = []
    for count in (4, 3):
        mask = None
        if padded:
            lengths = torch.tensor([12, 1, 7, 2])[:count]
            mask = torch.arange(12) < lengths[:, None]
        batches.append(TokenBatch(torch.randint(50, (count, 12), generator=generator), mask))
    return batches


@pytest.fixture
def transcoders(neox):
    """Random transcoders with statistics far from 0 and 1."""
    torch.manual_seed(1)
    made = make_transcoders(Recipe(init="random"), neox, CPU)
    for transcoder in made:
        with torch.no_grad():
            for name in ("input_mean", "output_mean"):
                getattr(transcoder, name).normal_()
            for name in ("input_std", "output_std"):
                getattr(transcoder, name).uniform_(0.5, 2)
    return made


def measured(base, transcoders, batches, losses=True):
    """The evaluation, and the content of evaluation.json; the affine maps."""
    activations = Activations(base, 48, device=CPU, dtype=torch.float32)
    affine = solve_affine(transcoders, held_out(False), activations, 32)
    replacement = Replacement(base, transcoders) if losses else None
    evaluation = measure(batches, activations, Reconstruction(transcoders, affine, CPU), replacement)
    return evaluation, affine


def run_in_float64(base, batches, replace=None, mean=None):
    """Log-probabilities [tokens, vocabulary], targets, and the (x, y) rows of every layer, one sequence at a time.

    `replace` maps layers to functions in place of their MLPs, `mean` to constants.
    """
    model = copy.deepcopy(base.model).double()
    rows = {layer: ([], []) for layer in base.layers}
    predictions, targets = [], []
    for batch in batches:
        for number, sequence in enumerate(batch.input_ids):
            length = 12 if batch.mask is None else int(batch.mask[number].sum())
            handles = []
            for layer in base.layers:

                def hook(_mlp, inputs, output, layer=layer):
                    rows[layer][0].append(inputs[0][0])
                    rows[layer][1].append(output[0])
                    if replace and layer in replace:
                        return replace[layer](inputs[0])
                    if mean and layer in mean:
                        return mean[layer].expand_as(output)
                    return output

                handles.append(model.get_submodule(base.mlp_path(layer)).register_forward_hook(hook))
            with torch.no_grad():
                logits = model(input_ids=sequence[None, :length]).logits[0]
            for handle in handles:
                handle.remove()
            predictions.append(log_softmax(logits[:-1], -1))
            targets.append(sequence[1:length])
    joined = {layer: (torch.cat(x), torch.cat(y)) for layer, (x, y) in rows.items()}
    return torch.cat(predictions), torch.cat(targets), joined


def printed_formula(transcoder):
    t = copy.deepcopy(transcoder).double()

    def forward(x):
        z = (x - t.input_mean) / t.input_std
        left, right = z @ t.left.weight.T + t.left.bias, z @ t.right.weight.T + t.right.bias
        return ((left * right) @ t.head.weight.T + t.head.bias) * t.output_std + t.output_mean

    return forward


@pytest.mark.parametrize("padded", [False, True])
def test_it_agrees_with_a_slow_float64_loop(neox, transcoders, padded):
    batches = held_out(padded)
    evaluation, (weights, biases) = measured(neox, transcoders, batches)
    result = evaluation.to_json()
    functions = {layer: printed_formula(t) for layer, t in enumerate(transcoders)}
    means = {layer: t.output_mean.double() for layer, t in enumerate(transcoders)}

    true, targets, rows = run_in_float64(neox, batches)
    ce = -true.gather(1, targets[:, None]).mean()
    assert result["tokens"] == len(rows[0][0]) == (12 + 1 + 7 + 2 + 12 + 1 + 7 if padded else 7 * 12)
    assert result["base"]["ce"] == pytest.approx(ce.item(), rel=1e-5)

    def losses(layers):
        replaced, _, _ = run_in_float64(neox, batches, replace={layer: functions[layer] for layer in layers})
        ablated, _, _ = run_in_float64(neox, batches, mean={layer: means[layer] for layer in layers})
        increase = -replaced.gather(1, targets[:, None]).mean() - ce
        ablation = -ablated.gather(1, targets[:, None]).mean() - ce
        kl = (true.exp() * (true - replaced)).sum(-1).mean()
        top1 = (replaced.argmax(-1) == true.argmax(-1)).double().mean()
        return dict(zip(LOSS_KEYS, (increase, kl, top1, 1 - increase / ablation), strict=True))

    for layer, (x, y) in rows.items():
        figures = result["layers"][str(layer)]
        z, predicted = (y - y.mean(0)) / y.std(0, correction=0), functions[layer](x)
        z_predicted = (predicted - y.mean(0)) / y.std(0, correction=0)
        linear = x @ weights[layer].double().T + biases[layer].double()
        z_linear = (linear - y.mean(0)) / y.std(0, correction=0)
        expected = {
            "fvu": (z - z_predicted).square().sum() / z.square().sum(),
            "variance_explained": 1 - (z - z_predicted).square().sum() / z.square().sum(),
            "fvu_raw": (y - predicted).square().sum() / (y - y.mean(0)).square().sum(),
            "mse": (y - predicted).square().mean(),
            "fvu_linear": (z - z_linear).square().sum() / z.square().sum(),
            **losses([layer]),
        }
        for key, value in expected.items():
            assert figures[key] == pytest.approx(value.item(), rel=2e-4, abs=2e-5)
    for key, value in losses(list(rows)).items():
        assert result["all_layers"][key] == pytest.approx(value.item(), rel=2e-4, abs=2e-5)
    for key, value in result["mean"].items():
        assert key.endswith("_se") or value == pytest.approx(
            sum(figures[key] for figures in result["layers"].values()) / 3
        )


class Itself(BilinearTC):
    """A 'transcoder' that is the MLP."""

    def forward(self, x):
        return self.copied(x)


def test_the_mlp_itself_explains_everything_and_costs_nothing(neox, transcoders):
    for layer, transcoder in enumerate(transcoders):
        transcoder.__class__ = Itself
        transcoder.copied = copy.deepcopy(neox.mlp(layer))
    evaluation, _ = measured(neox, transcoders, held_out(False))
    result = evaluation.to_json()
    for figures in [*result["layers"].values(), result["all_layers"]]:
        assert figures["ce_increase"] == pytest.approx(0, abs=1e-6)
        assert figures["kl"] == pytest.approx(0, abs=1e-6)
        assert figures["top1"] == 1
        assert figures["loss_recovered"] == pytest.approx(1, abs=1e-4)
    for figures in result["layers"].values():
        assert figures["fvu"] == pytest.approx(0, abs=1e-9)
        assert figures["fvu_linear"] > 1e-3


def test_where_mean_outputs_cost_nothing_there_is_no_loss_to_recover(neox, transcoders):
    """The MLP of layer 1 says one and the same, its mean, whatever comes in."""
    last = neox.mlp(1).dense_4h_to_h
    last.weight.zero_()
    transcoders[1].output_mean.copy_(last.bias)
    evaluation, _ = measured(neox, transcoders, held_out(False))
    result = evaluation.to_json()
    assert {layer: "loss_recovered" in figures for layer, figures in result["layers"].items()} == {
        "0": True,
        "1": False,
        "2": True,
    }
    assert result["layers"]["1"]["ce_increase"] != 0
    assert "loss_recovered" not in result["mean"]
    assert "ce_increase" in result["mean"]
    rows = {row[0]: row[1:] for row in map(str.split, loss_table(evaluation).splitlines()) if row[-1][-1] in "–%"}
    assert rows["1"][-1] == "–"
    assert rows["0"][-1].endswith("%")


def test_text_without_a_token_to_predict_is_refused_in_a_sentence(neox, transcoders):
    alone = [TokenBatch(torch.arange(8)[:, None])]
    with pytest.raises(ValueError, match=r"^the base's loss cannot be measured.*documents of at least 2 tokens$"):
        measured(neox, transcoders, alone)
    result, _ = measured(neox, transcoders, alone, losses=False)
    assert result.tokens == 8
    with pytest.raises(ValueError, match="the base's loss cannot be measured"):  # before any text is opened
        measure_held_out(transcoders, Recipe(seq_len=1, dataset="nowhere"), neox, batch_size=8, loss_tokens=8)


def test_the_affine_map_is_the_least_squares_one(neox, transcoders):
    _, (weights, biases) = measured(neox, transcoders, held_out(False), losses=False)
    _, _, rows = run_in_float64(neox, held_out(False))
    for layer, (x, y) in rows.items():
        design = torch.cat([x, torch.ones(len(x), 1)], dim=1)
        # the layer norm's outputs sum to 0: the design lacks a rank, and the map is unique only on such inputs
        solution = torch.linalg.pinv(design, rtol=1e-8) @ y
        predicted = x @ weights[layer].double().T + biases[layer].double()
        torch.testing.assert_close(predicted, design @ solution, rtol=0, atol=2e-3)


def test_the_base_is_as_it_was_afterwards(neox, transcoders):
    input_ids = held_out(False)[0].input_ids
    before = neox.model(input_ids=input_ids).logits
    measured(neox, transcoders, held_out(False))
    assert torch.equal(neox.model(input_ids=input_ids).logits, before)


def test_a_folder_without_transcoders_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds no layer_\* folder: expected a run"):
        _ = Run(tmp_path).layers


@pytest.mark.slow
def test_a_set_is_not_measured_on_a_file_that_it_was_fitted_on(tiny_fit, tmp_path):
    """Though its recipe holds nothing out; said before the base is loaded."""
    recipe = Recipe(base="/nowhere", dataset=str(tiny_fit.text / "shard-[0-4].jsonl"), eval_split=None)
    Run(tmp_path).write_root(recipe.to_dict())
    (tmp_path / "layer_0").mkdir()
    for shard, sentence in ((2, "shard-2.jsonl, which the fit is on: name another --split"), (5, "base '/nowhere'")):
        flags = ["--transcoders", tmp_path, "--split", tiny_fit.text / f"shard-{shard}.jsonl"]
        (said,) = tiny_fit.server.start(evaluate.main, flags).wait().errors
        assert sentence in said


@pytest.mark.slow
def test_a_token_that_the_base_has_not_is_said(tiny_fit, tmp_path):
    """Of the text that the affine maps are solved on, which comes before the one held out."""
    run = tmp_path / "run"
    shutil.copytree(tiny_fit.reference("--max_steps", 1, "--dataset", tiny_fit.text / "shard-[0-4].jsonl"), run)
    recipe = run / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("bos: none", "bos: '99999'"))
    finished = tiny_fit.server.start(evaluate.main, ["--transcoders", run, "--split", tiny_fit.text / "shard-5.jsonl"])
    said = "error: expected the base's own tokenizer, got the token 99999 for an embedding of 2048 rows"
    assert finished.wait().errors == [said]


@pytest.mark.slow
def test_losses_are_measured_on_as_many_tokens_as_are_asked_for(tiny_fit, tmp_path):
    run = tiny_fit.reference("--max_steps", 1, "--dataset", tiny_fit.text / "shard-[0-4].jsonl")
    split = sorted(tiny_fit.text.iterdir())[-1]
    flags = ["--transcoders", run, "--split", split, "--tokens", 1000, "--batch_size", 4, "--output", tmp_path]
    printed = []
    for count in (200, 2000, 0, -1):
        finished = tiny_fit.server.start(evaluate.main, [*flags, "--loss_tokens", count]).wait()
        printed.append(finished.stdout)
        if count < 0:
            assert finished.errors == ["error: loss_tokens must be at least 0, got -1"]
            break
        assert finished.returncode == 0, finished.stderr
        content = json.loads((tmp_path / "evaluation.json").read_text())
        assert content["tokens"] == 8 * 4 * 32  # whole batches
        assert content.get("loss_tokens") == (-(-count // 128) * 4 * 31 or None)
        assert ("all_layers" in content) == ("CE increase" in finished.stdout) == (count > 0)
    assert len({out[: out.index("\n\n")] for out in printed[:3]}) == 1  # the layers' scores are the same


@pytest.mark.slow
def test_the_ceiling_is_what_a_fit_to_the_derivative_alone_reaches(tiny_fit, tmp_path):
    split = sorted(tiny_fit.text.iterdir())[-1]
    cosines, dataset = {}, ("--dataset", tiny_fit.text / "shard-[0-4].jsonl")
    for name, jvp in (("own", 0), ("alone", 10000)):
        run = tiny_fit.reference("--jvp", jvp, *dataset)
        flags = ["--transcoders", run, "--split", split, "--tokens", 1000, "--batch_size", 4, "--loss_tokens", 0]
        more = ["--ceiling"] if name == "own" else []
        finished = tiny_fit.server.start(evaluate.main, [*flags, *more, "--output", tmp_path / name]).wait()
        assert finished.returncode == 0, finished.stderr
        cosines[name] = json.loads((tmp_path / name / "evaluation.json").read_text())["layers"]
    for layer, own in cosines["own"].items():
        assert own["jacobian_ceiling"] == pytest.approx(cosines["alone"][layer]["jacobian_cosine"], abs=1e-6)
        assert own["jacobian_ceiling"] > own["jacobian_cosine"]
    flags = [*flags, "--ceiling", "--output", tmp_path / "failed"]
    failed = tiny_fit.server.start(evaluate.main, flags, sabotage=["make_a_mistake"]).wait()
    assert failed.returncode == 1
    assert "jacobian_cosine" in (tmp_path / "failed" / "evaluation.json").read_text()  # what was measured before it
