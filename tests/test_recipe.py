"""Recipes: what files and flags set, and what is refused before any work."""

import re
from pathlib import Path

import pytest
import yaml

from bilinear_tc.train.recipe import RECIPES, Recipe, parse_recipe, read_settings
from bilinear_tc.train.run import Run


def test_no_arguments_mean_the_recipe_of_pythia_410m():
    recipe = parse_recipe([])
    assert (recipe.base, recipe.dataset) == ("EleutherAI/pythia-410m", "monology/pile-uncopyrighted")
    assert recipe.output_dir == "runs/pythia-410m"
    assert (recipe.split, recipe.eval_split) == ("train", "val.jsonl.zst")
    assert (recipe.seq_len, recipe.batch_size, recipe.max_steps, recipe.init) == (128, 512, 3000, "mlp")


def test_what_a_recipe_leaves_out_follows_from_the_rest():
    """0.02 at 65,536 tokens a step, and a 16th of them half of it; the closed form's own statistics and derivative."""
    assert (Recipe().lr, Recipe(batch_size=32).lr) == (0.02, 0.01)
    assert (Recipe().normalization, Recipe().jvp) == ("running", 0.1)
    random = Recipe(init="random")
    assert (random.normalization, random.jvp) == ("batch", 0.0)
    assert Recipe(init="random", jvp=0.5, normalization="running", lr=0.5).to_dict() == {
        **random.to_dict(),
        **{"jvp": 0.5, "normalization": "running", "lr": 0.5},
    }


def test_a_run_of_before_the_derivative_was_fitted_says_so(tmp_path):
    settings = {name: value for name, value in Recipe().to_dict().items() if name != "jvp"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(settings))
    assert Run(tmp_path).recipe.jvp == 0


def test_a_flag_outranks_the_recipe_file_which_outranks_the_default(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("lr: 0.5\nseq_len: 64\npack: false\n")
    recipe = parse_recipe(["--recipe", str(file), "--lr", "0.25", "--hidden_multiplier", "2"])
    assert (recipe.lr, recipe.seq_len, recipe.pack) == (0.25, 64, False)
    assert (recipe.hidden_multiplier, recipe.batch_size) == (2, Recipe().batch_size)
    assert recipe.output_dir == "runs/mine"


def test_the_card_recipe_holds_the_published_settings():
    card = parse_recipe(["--recipe", "pythia-410m-card"])
    assert (card.seq_len, card.batch_size, card.max_steps, card.hidden_multiplier, card.bias) == (
        128,
        512,
        3000,
        4,
        True,
    )
    assert (card.optimizer, card.lr, card.lr_schedule, card.momentum, card.weight_decay) == (
        "muon",
        0.02,
        "constant",
        0.95,
        0.01,
    )
    assert (card.split, card.eval_split) == ("train", "val.jsonl.zst")
    assert (card.init, card.normalization, card.pack, card.bias_lr) == ("random", "batch", False, 3e-4)


def test_the_defaults_are_the_recipe_of_pythia_410m():
    assert parse_recipe([]) == Recipe(output_dir="runs/pythia-410m")


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_recipe_is_a_recipe(path):
    assert parse_recipe(["--recipe", path.stem]).output_dir == f"runs/{path.stem}"


def test_a_written_recipe_reads_back(tmp_path):
    recipe = parse_recipe(["--recipe", "quickstart", "--layers", "0-2,4"])
    Run(tmp_path).write_root(recipe.to_dict())
    assert Recipe(**read_settings(tmp_path / "recipe.yaml")) == recipe
    assert set(yaml.safe_load((tmp_path / "recipe.yaml").read_text())) == set(recipe.to_dict())


@pytest.mark.parametrize(
    ("layers", "indices"), [(None, None), ("3", [3]), ("0-2,9", [0, 1, 2, 9]), ("5, 1-2, 2", [1, 2, 5])]
)
def test_layers(layers, indices):
    assert Recipe(layers=layers).layer_indices() == indices


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--lr", "-1"], "lr must be a positive number, got -1.0"),
        (["--hidden_multiplier", "0"], "n_hidden .* at least 1"),
        (["--batch_size", "0"], "batch_size must be at least 1, got 0"),
        (["--layers", "5-2"], "layers must read like 0-5,9, got '5-2'"),
        (["--layers", "first"], "layers must read like 0-5,9"),
        (["--momentum", "1"], "momentum must be at least 0 and below 1"),
        (["--momentum", "nan"], "momentum must be at least 0 and below 1, got nan"),
        (["--weight_decay", "-0.1"], "weight_decay must be a finite number of at least 0, got -0.1"),
        (["--weight_decay", "nan"], "weight_decay must be a finite number of at least 0, got nan"),
        (["--weight_decay", "inf"], "weight_decay must be a finite number of at least 0, got inf"),
        (["--hidden_multiplier", "nan"], "hidden_multiplier must be a positive number, .*, got nan"),
        (["--hidden_multiplier", "inf"], "hidden_multiplier must be a positive number, .*, got inf"),
        (["--lr", "nan"], "lr must be a positive number, got nan"),
        (["--seed", "-1"], "seed must be at least 0, got -1"),
        (["--seed", str(2**64)], f"seed must be below 2 to the 64th, so as to fit in 64 bits, got {2**64}"),
        (["--layers", "0-9999999999"], "layers must be below 10000, got '0-9999999999'"),
        (["--form", "input_sum"], "init mlp can start the bilinear form only"),
        (["--bias", "false"], "init mlp needs biases"),
        (["--recipe", "nonesuch"], "no recipe 'nonesuch': expected one of .*quickstart"),
    ],
)
def test_impossible_values_are_refused_in_a_sentence(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        parse_recipe(arguments)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("batch_size: 2.5", "batch_size must be a whole number, got 2.5"),
        ("batch_size: true", "batch_size must be a whole number, got True"),
        ("micro_batch_size: 2.5", "micro_batch_size must be a whole number or null, got 2.5"),
        ("seed: null", "seed must be a whole number, got null"),
        ("lr: [1, 2]", "lr must be a number or null, got [1, 2]"),
        ("lr: fast", "lr must be a number or null, got 'fast'"),
        ("momentum: true", "momentum must be a number, got True"),
        ("weight_decay: .nan", "weight_decay must be a finite number of at least 0, got nan"),
        ("pack: 1", "pack must be true or false, got 1"),
        ("compile: 0.5", "compile must be true or false or null, got 0.5"),
        ("base_revision: 1234567", "base_revision must be text or null, got 1234567"),
        ("eval_split: false", "eval_split must be text or null, got False"),
        ("layers: [0, 1]", "layers must be text or null, got [0, 1]"),
        ("optimizer: [muon]", "optimizer must be one of muon, normuon, adamw, got ['muon']"),
        ("1: 2", "sets 1, which no recipe has"),
    ],
)
def test_a_value_of_another_type_in_a_file_is_refused_in_a_sentence(tmp_path, line, sentence):
    file = tmp_path / "mine.yaml"
    file.write_text(line)
    with pytest.raises(ValueError, match=re.escape(sentence)):
        Recipe(**read_settings(file))


def test_numbers_in_a_file_may_be_written_as_people_write_them(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("lr: 1e-3\nhidden_multiplier: 2\nweight_decay: 0\nlayers: 3\n")
    for recipe in (Recipe(**read_settings(file)), parse_recipe(["--recipe", str(file)])):
        assert (recipe.lr, recipe.hidden_multiplier, recipe.weight_decay) == (0.001, 2, 0)
        assert recipe.layer_indices() == [3]


def test_an_unknown_setting_in_a_file_is_named(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("learning_rate: 1\n")
    with pytest.raises(ValueError, match="sets learning_rate, which no recipe has"):
        parse_recipe(["--recipe", str(file)])


@pytest.mark.parametrize("arguments", [["--nonesuch", "1"], ["--optimizer", "sgd"], ["--max_step", "3"]])
def test_unknown_flags_and_choices_end_with_usage(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        parse_recipe(arguments)
    assert exit_.value.code == 2
    assert arguments[0] in capsys.readouterr().err


def test_home_is_spelled_out_in_paths(monkeypatch):
    monkeypatch.setenv("HOME", "/home/reader")
    recipe = Recipe(base="~/base", dataset="~/a.txt,$HOME/b.txt", output_dir="$HOME/run")
    assert (recipe.base, recipe.output_dir) == ("/home/reader/base", "/home/reader/run")
    assert recipe.dataset == "/home/reader/a.txt,/home/reader/b.txt"
    assert Run("~/run").folder == Path("/home/reader/run")
