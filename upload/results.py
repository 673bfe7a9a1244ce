"""What a run says about its fits: its layers, their settings, training histories and scores."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import yaml

from bilinear_tc.upload.evaluation import read_evaluation

SETTLED_STEPS = 50  # a training batch's FVU is noisy: a history's final value is the mean over its last steps


@dataclass(frozen=True)
class Results:
    """The scores of a run's layers, all from one source.

    Attributes:
        held_out: whether they were measured on held-out text (evaluation.json) or on training batches (histories).
        layers: per layer its scores; `fvu` and `variance_explained` always, others where they were measured.
        all_layers: scores with every layer replaced at once; empty where they were not measured.
        dataset, split, tokens: the held-out text; the training text where `held_out` is false (tokens None).
        base_ce: the base's own cross-entropy on that text, nats a token, where it was measured.
    """

    held_out: bool
    layers: dict[int, dict[str, float]]
    all_layers: dict[str, float]
    dataset: str | None
    split: str | None
    tokens: int | None
    base_ce: float | None = None

    def values(self, key: str) -> dict[int, float]:
        """One score of every layer that has it, by layer."""
        return {layer: scores[key] for layer, scores in self.layers.items() if scores.get(key) is not None}

    def mean(self, key: str) -> float | None:
        """A score's mean over the layers, None unless every layer has it."""
        values = self.values(key)
        return float(np.mean(list(values.values()))) if len(values) == len(self.layers) else None


def layer_folders(run: Path) -> dict[int, Path]:
    """The folders `layer_{L}` of a run by layer, ascending.

    Raises:
        ValueError: where there is none.
    """
    found = {
        int(match[1]): folder
        for folder in run.glob("layer_*")
        if (match := re.fullmatch(r"layer_(\d+)", folder.name)) and folder.is_dir()
    }
    if not found:
        raise ValueError(f"{run} holds no layer_* folder: expected a run, as train/fit.py writes it")
    return dict(sorted(found.items()))


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file of settings; empty where it does not exist."""
    if not path.is_file():
        return {}
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not readable YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} holds {type(settings).__name__}: expected settings, one `name: value` a line")
    return settings


def read_history(folder: Path) -> dict[str, np.ndarray]:
    """A layer's training history by column (step, tokens, mse, variance_explained, fvu), one row a step.

    Empty columns where the layer has no history, as after a fit of no steps.
    """
    path = folder / "history.parquet"
    columns = ("step", "tokens", "mse", "variance_explained", "fvu")
    if not path.is_file():
        return {name: np.empty(0) for name in columns}
    try:
        table = pq.read_table(path, columns=list(columns))
    except (OSError, ValueError, KeyError) as error:  # pyarrow's own errors are subclasses of these
        raise ValueError(f"{path} is not a history: {str(error).splitlines()[0]}") from error
    history = {name: table[name].to_numpy() for name in columns}
    for name, values in history.items():
        if not np.issubdtype(values.dtype, np.number):
            raise ValueError(f"{path} is not a history: expected numbers in its column {name}")
    return history


def read_results(run: Path) -> Results:
    """A run's scores: held out where evaluation.json covers every layer, else from the end of the histories.

    Raises:
        ValueError: where a layer has neither, or a file is not readable.
    """
    layers = list(layer_folders(run))
    evaluation = read_evaluation(run)
    measured = {int(layer): scores for layer, scores in evaluation.get("layers", {}).items()}
    if set(layers) <= set(measured):
        return Results(
            held_out=True,
            layers={layer: measured[layer] for layer in layers},
            # replacing all layers of a larger set says nothing about replacing these
            all_layers=evaluation.get("all_layers", {}) if set(layers) == set(measured) else {},
            dataset=evaluation.get("dataset"),
            split=evaluation.get("split"),
            tokens=evaluation.get("tokens"),
            base_ce=evaluation.get("base", {}).get("ce"),
        )
    recipe = read_yaml(run / "recipe.yaml")
    return Results(
        held_out=False,
        layers={layer: final_scores(run / f"layer_{layer}") for layer in layers},
        all_layers={},
        dataset=recipe.get("dataset"),
        split=recipe.get("split"),
        tokens=None,
    )


def final_scores(folder: Path) -> dict[str, float]:
    """Mean scores over the last steps of a layer's history."""
    history = read_history(folder)
    if not len(history["step"]):
        raise ValueError(
            f"{folder.name} has neither held-out scores nor a training history: run train/evaluate.py first"
        )
    return {name: float(history[name][-SETTLED_STEPS:].mean()) for name in ("mse", "variance_explained", "fvu")}
