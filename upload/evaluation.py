"""evaluation.json, the held-out scores of a run: read, and all that can be wrong with it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

NAME = "evaluation.json"
ALWAYS = ("fvu", "variance_explained")  # the scores of a layer that card and figures cannot do without


def read_evaluation(run: Path) -> dict[str, Any]:
    """evaluation.json's content; empty where there is none.

    Raises:
        ValueError: the first of `evaluation_problems`.
    """
    for problem in evaluation_problems(run):
        raise ValueError(problem)
    return _load(run)


def evaluation_problems(run: Path) -> Iterator[str]:
    """All that is wrong with a run's evaluation.json, a sentence each; nothing where there is none."""
    try:
        evaluation = _load(run)
    except ValueError as error:
        yield f"{run / NAME} is not readable JSON: {error}; run train/evaluate.py again"
        return
    for problem in _content_problems(evaluation):
        yield f"{run / NAME}: {problem}; run train/evaluate.py again"


def _load(run: Path) -> Any:
    path = run / NAME
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _content_problems(evaluation: Any) -> Iterator[str]:
    if not isinstance(evaluation, dict):
        yield f"expected scores by name, got {type(evaluation).__name__}"
        return
    for name, kind, expected in (("dataset", str, "a name"), ("split", str, "a name"), ("tokens", int, "a number")):
        if not isinstance(evaluation.get(name), (kind, type(None))):
            yield f"{name} must be {expected}, got {evaluation[name]!r}"
    for name in ("base", "all_layers", "mean"):
        if name in evaluation:
            yield from _score_problems(name, evaluation[name])
    layers = evaluation.get("layers", {})
    if not isinstance(layers, dict):
        yield f"layers must hold scores by layer, got {type(layers).__name__}"
        return
    for layer, scores in layers.items():
        yield from _score_problems(f"layer {layer}", scores, needed=ALWAYS)
        if not layer.isdecimal():
            yield f"layers must be named by their numbers, got {layer!r}"


def _score_problems(name: str, scores: Any, needed: Sequence[str] = ()) -> Iterator[str]:
    if not isinstance(scores, dict):
        yield f"{name} must hold scores by name, got {type(scores).__name__}"
        return
    bad = [key for key, value in scores.items() if key != "model" and not _is_finite(value)]  # the base has a name
    if bad:
        yield f"{', '.join(bad)} of {name} {'is not a finite number' if len(bad) == 1 else 'are not finite numbers'}"
    yield from (f"{name} has no {key}" for key in needed if key not in scores)


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
