"""What was measured of a set, typed: the scores of its layers, their JSON form (evaluation.json) and its checks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from bilinear_tc.train.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class LossScores:
    """What the base loses with MLPs replaced; None for what was not measured.

    Attributes:
        ce_increase: rise of the cross-entropy, nats a token.
        kl: KL(base ‖ base with transcoders), nats a token.
        loss_recovered: 1 − ce_increase / (its rise with the MLPs' mean outputs); None if that costs nothing either.
    """

    ce_increase: float
    kl: float | None = None
    loss_recovered: float | None = None


@dataclass(frozen=True, kw_only=True)
class LayerScores:
    """The scores of one layer; None for what was not measured.

    Attributes:
        fvu, variance_explained: on z-scored outputs; each is 1 − the other.
        fvu_raw: FVU on raw outputs.
        mse: mean squared error of a raw output feature; in a history, of a z-scored one.
        fvu_linear: FVU of the best affine map of the same input.
        ce_increase, kl, loss_recovered: as in `LossScores`, with this layer's MLP alone replaced.
    """

    fvu: float
    fvu_raw: float | None = None
    variance_explained: float
    mse: float | None = None
    fvu_linear: float | None = None
    ce_increase: float | None = None
    kl: float | None = None
    loss_recovered: float | None = None


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The scores of a set, all from one text.

    Attributes:
        layers: each layer's scores, ascending.
        all_layers: with every layer of the set replaced at once; None if that was not measured.
        dataset, split, tokens: the text, and how much of it was measured on.
        base, base_ce: the base, and its own cross-entropy on that text in nats a token.
        held_out: False for scores of training batches, taken from the histories; these are never written.
    """

    layers: dict[int, LayerScores]
    all_layers: LossScores | None = None
    dataset: str | None = None
    split: str | None = None
    tokens: int | None = None
    base: str | None = None
    base_ce: float | None = None
    held_out: bool = True

    def values(self, score: str) -> dict[int, float]:
        """One score of every layer that has it, by layer."""
        found = {layer: getattr(scores, score) for layer, scores in self.layers.items()}
        return {layer: value for layer, value in found.items() if value is not None}

    def mean(self, score: str) -> float | None:
        """A score's mean over the layers, None unless every layer has it."""
        values = self.values(score)
        return sum(values.values()) / len(values) if len(values) == len(self.layers) else None

    def to_json(self) -> dict[str, Any]:
        """The content of evaluation.json; what was not measured is left out."""
        together = {} if self.all_layers is None else {"all_layers": _measured(vars(self.all_layers))}
        return {
            "dataset": self.dataset,
            "split": self.split,
            "tokens": self.tokens,
            "base": _measured({"model": self.base, "ce": self.base_ce}),
            "layers": {str(layer): _measured(vars(scores)) for layer, scores in self.layers.items()},
            **together,
            "mean": _measured({field.name: self.mean(field.name) for field in fields(LayerScores)}),
        }

    @classmethod
    def from_json(cls, content: Any) -> Evaluation:
        """The evaluation that evaluation.json holds; UserError with the first of `json_problems`."""
        for problem in json_problems(content):
            raise UserError(problem)
        base, all_layers = content.get("base", {}), content.get("all_layers")
        layers = {int(layer): _known(LayerScores, scores) for layer, scores in content.get("layers", {}).items()}
        return cls(
            layers=dict(sorted(layers.items())),
            all_layers=_known(LossScores, all_layers) if all_layers else None,
            **{name: content.get(name) for name in ("dataset", "split", "tokens")},
            base=base.get("model"),
            base_ce=base.get("ce"),
        )


def json_problems(content: Any) -> Iterator[str]:
    """All that is wrong with the content of an evaluation.json, a phrase each."""
    if not isinstance(content, dict):
        yield f"expected scores by name, got {type(content).__name__}"
        return
    for name, kind, expected in (("dataset", str, "a name"), ("split", str, "a name"), ("tokens", int, "a number")):
        if not isinstance(content.get(name), (kind, type(None))):
            yield f"{name} must be {expected}, got {content[name]!r}"
    for name in ("base", "all_layers", "mean"):
        if name in content:
            needed = ("ce_increase",) if name == "all_layers" and content[name] else ()
            yield from _score_problems(name, content[name], needed)
    layers = content.get("layers", {})
    if not isinstance(layers, dict):
        yield f"layers must hold scores by layer, got {type(layers).__name__}"
        return
    for layer, scores in layers.items():
        yield from _score_problems(f"layer {layer}", scores, ("fvu", "variance_explained"))
        if not layer.isdecimal():
            yield f"layers must be named by their numbers, got {layer!r}"


def _score_problems(name: str, scores: Any, needed: Sequence[str]) -> Iterator[str]:
    if not isinstance(scores, dict):
        yield f"{name} must hold scores by name, got {type(scores).__name__}"
        return
    numbers = {key: value for key, value in scores.items() if key != "model"}  # the base has a name
    bad = [key for key, v in numbers.items() if not isinstance(v, (int, float)) or not math.isfinite(v)]
    if bad:
        yield f"{', '.join(bad)} of {name} {'is not a finite number' if len(bad) == 1 else 'are not finite numbers'}"
    yield from (f"{name} has no {key}" for key in needed if key not in scores)


def _measured(scores: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in scores.items() if value is not None}


def _known(kind: type[T], scores: dict[str, float]) -> T:
    """The scores that the class of this version knows: a later one may have written more."""
    return kind(**{name: scores[name] for name in kind.__dataclass_fields__ if name in scores})  # type: ignore[attr-defined]
