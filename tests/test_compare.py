"""The comparison with the card's recipe and the trial of single settings, on a tiny base and local text."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from pathlib import Path

import pytest
import torch
import yaml
from fitting import TinyFit

from bilinear_tc.train.base import Base
from bilinear_tc.train.recipe import Recipe, read_settings
from bilinear_tc.train.run import Run
from bilinear_tc.train.studies import trade, tune
from bilinear_tc.train.studies.compare import ComparisonSettings, compare_recipes, harden, shorter

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def recipe(tiny_fit: TinyFit, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe file: two layers, 8 × 32 tokens a step, text to fit on and another text held out."""
    folder = tmp_path_factory.mktemp("comparison")
    text = folder / "text"
    text.mkdir()
    (text / "train.jsonl").write_text((tiny_fit.text / "shard-0.jsonl").read_text())
    (text / "validation.jsonl").write_text((tiny_fit.text / "shard-1.jsonl").read_text())
    settings = {
        "base": str(tiny_fit.base),
        "dataset": str(text),
        "eval_split": "validation",
        "seq_len": 32,
        "batch_size": 8,
        "init_tokens": 1024,
        "lr": 0.04,
        "tokenizer_workers": 0,
    }
    file = folder / "tiny.yaml"
    file.write_text(yaml.safe_dump(settings))
    return file


def test_a_hardened_mlp_computes_with_scaled_pre_activations(neox):
    x = torch.randn(7, 16, generator=torch.Generator().manual_seed(0))
    mlp = neox.mlp(1)
    first, last = mlp.dense_h_to_4h, mlp.dense_4h_to_h
    expected = torch.nn.functional.gelu(5 * first(x)) @ last.weight.T / 5 + last.bias
    harden(neox, 5)
    torch.testing.assert_close(mlp(x), expected, rtol=1e-4, atol=1e-5)


def test_a_gated_mlp_is_not_hardened(llama):
    with pytest.raises(ValueError, match="two-matrix"):
        harden(llama, 5)


@pytest.mark.parametrize(("tokens", "calibration", "steps"), [(10_000, 1024, 35), (1500, 512, 3), (512, 256, 1)])
def test_a_shorter_fit_pays_for_its_calibration_and_its_steps(tokens: int, calibration: int, steps: int) -> None:
    recipe = Recipe(batch_size=8, seq_len=32, init_tokens=1024, max_steps=1000)
    assert shorter(recipe, tokens) == dataclasses.replace(recipe, init_tokens=calibration, max_steps=steps)
    assert calibration + steps * 256 <= tokens < calibration + (steps + 1) * 256


def test_a_fit_of_no_step_is_none() -> None:
    assert shorter(Recipe(batch_size=8, seq_len=32), 511) is None


@pytest.mark.slow
def test_the_comparison_writes_what_it_prints(recipe: Path, tmp_path: Path, capsys) -> None:
    settings = ComparisonSettings(
        recipe=str(recipe),
        steps=40,
        eval_tokens=2048,
        points=4,
        harden=2,
        hidden_multiplier=6,
        output_dir=str(tmp_path),
    )
    compare_recipes(settings, CPU)
    printed = capsys.readouterr().out
    assert "hidden units a layer: card 64, ours 96" in printed
    (figure,) = tmp_path.glob("*.png")
    assert figure.name == "base_x2_width6.png"
    curves = json.loads(figure.with_suffix(".json").read_text())["curves"]
    card, ours, closed, short = curves.values()
    assert card["tokens"] == [10 * 256 * part for part in range(5)]
    assert ours["tokens"][-1] == 40 * 256  # equal tokens, the calibration sample's among them
    assert closed["tokens"] == [1024]

    rows = re.findall(r"^ *(0|1|mean) +([\d.]+) +([\d.]+) +([\d.]+) +([\d.]+)$", printed, re.MULTILINE)
    finals = [*zip(card["fvu"][-1], ours["fvu"][-1], closed["fvu"][-1], strict=True)]
    finals.append(tuple(sum(column) / 2 for column in zip(*finals, strict=True)))
    for (name, *figures), (a, b, c), expected in zip(rows, finals, ("0", "1", "mean"), strict=True):
        assert (name, figures) == (expected, [f"{a:.4f}", f"{b:.4f}", f"{b / a:.2f}", f"{c:.4f}"])
    a, b, _ = finals[-1]
    assert b < a
    assert f"at equal tokens ours is {1 - b / a:.1%} below the card's recipe; 2 of 2 layers" in printed
    reached = [sum(row) / 2 <= a for row in short["fvu"]]
    assert reached == [False] * (len(reached) - 1) + [True]
    assert f"is reached with {short['tokens'][-1] / (40 * 256):.1%} of its tokens" in printed


def test_changes_are_scored_on_the_text_that_follows_the_fits(recipe: Path) -> None:
    """The sequences that a fit of as many steps again would read next."""
    settings = dataclasses.replace(Recipe(**read_settings(recipe)), max_steps=3, eval_tokens=512)
    base = Base.load(settings.base)
    following = tune.following_text(settings, base, CPU)
    assert following.rows == 512
    with tune.open_batches(settings, base.tokenizer, CPU) as text:
        read = [next(text).input_ids for _ in range(4 + 3 + 2)]
    x, y = base.activations(torch.cat(read[-2:]))[1]
    torch.testing.assert_close(following.x[1], x.flatten(0, 1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(following.y[1], y.flatten(0, 1), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_each_change_is_compared_with_the_recipe(recipe: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(tune, "CHANGES", [{}, {"lr": 0.001}, {"optimizer": "normuon"}])
    arguments = ["--recipe", str(recipe), "--steps", "12", "--layers", "0,1", "--eval_tokens", "1024", "--harden", "2"]
    monkeypatch.setattr(sys, "argv", ["train/studies/tune.py", *arguments])
    tune.main()
    printed = capsys.readouterr().out
    rows = re.findall(r"^\| (.*?) \| ([\d.]+) \| ([-+][\d.]+)% \| ([\d.]+), ([\d.]+) \|$", printed, re.MULTILINE)
    assert [row[0] for row in rows] == ["none", "lr 0.001", "optimizer normuon"]
    kept = float(rows[0][1])
    for _, mean, change, first, second in rows:
        assert float(mean) == pytest.approx((float(first) + float(second)) / 2, abs=1e-4)
        rounded = 100 * 1e-4 / kept  # the two figures are printed to four digits, the change in per cent to one
        assert float(change) == pytest.approx(100 * (float(mean) / kept - 1), abs=0.05 + rounded)
    assert len({row[1] for row in rows}) == 3


@pytest.mark.slow
def test_the_trade_is_measured_as_the_set_of_that_recipe_is(recipe: Path, tiny_fit, monkeypatch, capsys) -> None:
    """Its figures are those of a run of the same recipe, evaluated."""
    changes = {name: {"init": "random", "jvp": w, "max_steps": 12} for name, w in (("plain", 0.0), ("derivative", 1.0))}
    monkeypatch.setattr(trade, "CHANGES", changes)
    monkeypatch.setattr(sys, "argv", ["train/studies/trade.py", "--recipe", str(recipe), "--loss_tokens", "256"])
    trade.main()
    rows = re.findall(r"^\| (plain|derivative) \| (.*) \|$", capsys.readouterr().out, re.MULTILINE)
    figures = {name: [float(cell) for cell in cells.split(" | ")] for name, cells in rows}
    assert set(figures) == {"plain", "derivative"}
    assert figures["plain"][2] < figures["derivative"][2]  # the Jacobian's cosine
    run = recipe.parent / "run"
    settings = ["--recipe", recipe, "--init", "random", "--jvp", 1.0, "--max_steps", 12]
    assert tiny_fit.run(run, *settings).returncode == 0
    scores = Run(run).evaluation
    means = [scores.mean(of) for of in ("fvu", "fvu_ordinary", "jacobian_cosine")]
    assert figures["derivative"][:3] == pytest.approx(means, abs=1e-3)
