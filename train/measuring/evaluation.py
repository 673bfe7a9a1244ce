"""What was measured of a set, typed: the scores of its layers, their JSON form (evaluation.json) and its checks."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

from bilinear_tc.train.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class LossScores:
    """What the base loses with MLPs replaced; None for what was not measured.

    Attributes:
        ce_increase: rise of the cross-entropy, nats a token.
        kl: KL(base ‖ base with transcoders), nats a token.
        top1: the share of tokens at which the most likely next one is the base's own.
        loss_recovered: 1 − ce_increase / (its rise with the MLPs' mean outputs); None if that costs nothing either.
        ce_increase_se, kl_se, top1_se: standard errors over sequences.
    """

    ce_increase: float
    ce_increase_se: float | None = None
    kl: float | None = None
    kl_se: float | None = None
    top1: float | None = None
    top1_se: float | None = None
    loss_recovered: float | None = None


@dataclass(frozen=True, kw_only=True)
class Continuations:
    """How long greedy continuations stay the base's own with every layer of the set replaced at once.

    Attributes:
        prompts: how many were continued, each the beginning of a held-out sequence.
        prompt_tokens, tokens: length of a prompt, and of a continuation.
        same_median, same_mean: the position in the continuation, from 0, of the first token that is not the base's;
            `tokens` if none is.
        same_mean_se: standard error over prompts.
        prompt, base, replaced: the text of the prompt that has the median, and of its continuations.
    """

    prompts: int
    prompt_tokens: int
    tokens: int
    same_median: float
    same_mean: float
    same_mean_se: float | None = None
    prompt: str | None = None
    base: str | None = None
    replaced: str | None = None


@dataclass(frozen=True, kw_only=True)
class LayerScores:
    """The scores of one layer; None for what was not measured.

    Rows are *ordinary* unless their output is massive, by the rule in `Evaluation`.

    Attributes:
        fvu, variance_explained: on z-scored outputs; each is 1 − the other.
        fvu_se, fvu_ordinary_se: standard errors over sequences.
        fvu_raw: FVU on raw outputs.
        mse: mean squared error of a raw output feature; in a history, of a z-scored one.
        fvu_linear: FVU of the best affine map of the same input.
        worst_channel: the output channel (`index`) that carries more than half of the raw squared error, if one does,
            and its `share`.
        fvu_ordinary: FVU on ordinary rows, z-scored by their own statistics.
        massive_share: the share of rows that are massive.
        massive_norm: the norm of an output above which it is massive.
        massive_error: Σ‖y − ŷ‖² / Σ‖y‖² on massive rows.
        error_quantiles: of an ordinary row's own error ‖z − ẑ‖² / n_outputs, by percent.
        error_by_position: mean of that error by position in the sequence; over all of them, that mean is fvu_ordinary.
        jacobian_cosine, jacobian_error: of the Jacobians over isotropic probes in z units, as `jacobian.py` says.
        jacobian_ceiling: the cosine that a fit to the derivative alone reaches, as `ceiling.py` says.
        jacobian_cosine_data, jacobian_error_data: the same over differences of two tokens' inputs.
        interchange: R² of the predicted change of the output as one upstream component comes from another token.
        halfway: the same as the input itself moves half way to another token's.
        low_variance_share: of the top eigenvectors, what lies in the directions with 3% of the inputs' variance.
        ce_increase, ce_increase_se, kl, kl_se, top1, top1_se, loss_recovered: as in `LossScores`, with this MLP alone
            replaced.
    """

    fvu: float
    fvu_se: float | None = None
    fvu_raw: float | None = None
    variance_explained: float
    mse: float | None = None
    fvu_linear: float | None = None
    worst_channel: dict[str, float] | None = None
    fvu_ordinary: float | None = None
    fvu_ordinary_se: float | None = None
    massive_share: float | None = None
    massive_norm: float | None = None
    massive_error: float | None = None
    error_quantiles: dict[str, float] | None = None
    error_by_position: dict[str, float] | None = None
    jacobian_cosine: float | None = None
    jacobian_error: float | None = None
    jacobian_ceiling: float | None = None
    jacobian_cosine_data: float | None = None
    jacobian_error_data: float | None = None
    interchange: dict[str, float] | None = None
    halfway: float | None = None
    low_variance_share: float | None = None
    ce_increase: float | None = None
    ce_increase_se: float | None = None
    kl: float | None = None
    kl_se: float | None = None
    top1: float | None = None
    top1_se: float | None = None
    loss_recovered: float | None = None

    @property
    def interchange_mean(self) -> float | None:
        return sum(self.interchange.values()) / len(self.interchange) if self.interchange else None

    @property
    def interchange_worst(self) -> float | None:
        return min(self.interchange.values()) if self.interchange else None


NEEDED = ("fvu", "variance_explained")
TABLES = ("worst_channel", "error_quantiles", "error_by_position", "interchange")
CONTINUED = ("prompts", "prompt_tokens", "tokens", "same_median", "same_mean")
WORDS = ("model", "prompt", "base", "replaced")  # what has a text in place of a number
NUMBERS = {f.name for kind in (LossScores, Continuations, LayerScores) for f in fields(kind)} - {*TABLES, *WORDS}
SUMMARIES = [f.name for f in fields(LayerScores) if f.name not in TABLES and not f.name.endswith("_se")]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The scores of a set, all from one text.

    Attributes:
        layers: each layer's scores, ascending.
        all_layers, continuations: with every layer of the set replaced at once; None if that was not measured.
        dataset, split, tokens: the text, and how much of it was measured on.
        loss_tokens: how many of its tokens the losses were predicted for.
        massive_rule: which rows are massive.
        mean_se: standard errors of means over the layers, by the names of `LayerScores`' own.
        base, base_ce: the base, and its own cross-entropy on that text in nats a token.
        held_out: False for scores of training batches, taken from the histories; these are never written.
    """

    layers: dict[int, LayerScores]
    all_layers: LossScores | None = None
    continuations: Continuations | None = None
    dataset: str | None = None
    split: str | None = None
    tokens: int | None = None
    loss_tokens: int | None = None
    massive_rule: str | None = None
    mean_se: dict[str, float] = field(default_factory=dict)
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

    def only(self, layers: Collection[int]) -> Evaluation:
        """What it says of some of its layers: replacing all of them at once says nothing about replacing these."""
        if set(layers) == set(self.layers):
            return self
        some = {layer: self.layers[layer] for layer in layers}
        return replace(self, layers=some, all_layers=None, continuations=None, mean_se={})

    def to_json(self) -> dict[str, Any]:
        """The content of evaluation.json; what was not measured is left out."""
        together = {"all_layers": self.all_layers, "continuations": self.continuations}
        return {
            "dataset": self.dataset,
            "split": self.split,
            "tokens": self.tokens,
            **_measured({"loss_tokens": self.loss_tokens, "massive_rule": self.massive_rule}),
            "base": _measured({"model": self.base, "ce": self.base_ce}),
            "layers": {str(layer): _measured(vars(scores)) for layer, scores in self.layers.items()},
            **{name: _measured(vars(scores)) for name, scores in together.items() if scores is not None},
            "mean": _measured({score: self.mean(score) for score in SUMMARIES} | self.mean_se),
        }

    @classmethod
    def from_json(cls, content: Any) -> Evaluation:
        """The evaluation that evaluation.json holds; UserError with the first of `json_problems`."""
        for problem in json_problems(content):
            raise UserError(problem)
        base, all_layers, continuations = (content.get(name, {}) for name in ("base", "all_layers", "continuations"))
        layers = {int(layer): _known(LayerScores, scores) for layer, scores in content.get("layers", {}).items()}
        return cls(
            layers=dict(sorted(layers.items())),
            all_layers=_known(LossScores, all_layers) if all_layers else None,
            continuations=_known(Continuations, continuations) if continuations else None,
            **{name: content.get(name) for name in TEXT},
            mean_se={name: value for name, value in content.get("mean", {}).items() if name.endswith("_se")},
            base=base.get("model"),
            base_ce=base.get("ce"),
        )


def finite(scores: Mapping[str, Any]) -> dict[str, Any]:
    """Scores without those that came to no finite number, but for those that no layer is without."""
    tables = {name: finite(value) or None if isinstance(value, dict) else value for name, value in scores.items()}
    return {n: v for n, v in tables.items() if n in NEEDED or not isinstance(v, float) or math.isfinite(v)}


TEXT = {"dataset": str, "split": str, "tokens": int, "loss_tokens": int, "massive_rule": str}


def json_problems(content: Any) -> Iterator[str]:
    """All that is wrong with the content of an evaluation.json, a phrase each."""
    if not isinstance(content, dict):
        yield f"expected scores by name, got {type(content).__name__}"
        return
    for name, kind in TEXT.items():
        if not isinstance(content.get(name), (kind, type(None))):
            yield f"{name} must be {'a number' if kind is int else 'a name'}, got {content[name]!r}"
    for name, needed in {"base": (), "all_layers": ("ce_increase",), "continuations": CONTINUED, "mean": ()}.items():
        if name in content:
            yield from _score_problems(name, content[name], needed if content[name] else ())
    layers = content.get("layers", {})
    if not isinstance(layers, dict):
        yield f"layers must hold scores by layer, got {type(layers).__name__}"
        return
    for layer, scores in layers.items():
        yield from _score_problems(f"layer {layer}", scores, NEEDED)
        if not layer.isdecimal():
            yield f"layers must be named by their numbers, got {layer!r}"


def _score_problems(name: str, scores: Any, needed: Sequence[str]) -> Iterator[str]:
    if not isinstance(scores, dict):
        yield f"{name} must hold scores by name, got {type(scores).__name__}"
        return
    tables = {key: value for key, value in scores.items() if isinstance(value, dict) and key not in NUMBERS}
    for key, table in tables.items():
        yield from _number_problems(f"{key} of {name}", table, ("index", "share") if key == "worst_channel" else ())
    yield from (f"{key} of {name} must hold numbers by name" for key in TABLES if key in {*scores} - {*tables})
    yield from (
        f"{key} of {name} must be a text" for key in WORDS if not isinstance(scores.get(key), (str, type(None)))
    )
    named = {*tables, *TABLES, *WORDS}
    yield from _number_problems(name, {key: value for key, value in scores.items() if key not in named}, needed)


def _number_problems(name: str, numbers: dict[str, Any], needed: Sequence[str]) -> Iterator[str]:
    bad = [key for key, v in numbers.items() if not isinstance(v, (int, float)) or not math.isfinite(v)]
    if bad:
        yield f"{', '.join(bad)} of {name} {'is not a finite number' if len(bad) == 1 else 'are not finite numbers'}"
    yield from (f"{name} has no {key}" for key in needed if key not in numbers)


def _measured(scores: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in scores.items() if value is not None}


def _known(kind: type[T], scores: dict[str, float]) -> T:
    """The scores that the class of this version knows: a later one may have written more."""
    return kind(**{name: scores[name] for name in kind.__dataclass_fields__ if name in scores})  # type: ignore[attr-defined]
