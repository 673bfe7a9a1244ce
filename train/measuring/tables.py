"""The tables that a fit and an evaluation print."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from statistics import fmean
from types import MappingProxyType
from typing import Any

from bilinear_tc.train.measuring.evaluation import Evaluation

Columns = dict[str, tuple[str, str]]  # a score: its heading, its format

FIT_COLUMNS: Columns = {
    "fvu": ("FVU", ".4f"),
    "fvu_start": ("at the start", ".4f"),
    "fvu_ordinary": ("ordinary tokens", ".4f"),
    "fvu_linear": ("best affine map", ".4f"),
    "jacobian_cosine": ("Jacobian cosine", ".3f"),
    "interchange_mean": ("interchange R²", ".3f"),
    "interchange_worst": ("its worst", ".3f"),
}
LOSS_COLUMNS: Columns = {
    "ce_increase": ("CE increase", ".4f"),
    "kl": ("KL", ".4f"),
    "top1": ("top-1 agreement", ".2%"),
    "loss_recovered": ("loss recovered", ".2%"),
}


def fit_table(evaluation: Evaluation, fits: Mapping[int, Mapping[str, Any]] = MappingProxyType({})) -> str:
    """The table of what a fit reached, and of what a reader should know that is in no column.

    Args:
        evaluation: what was measured.
        fits: the `fit` of the layers' config.yaml, which may know their FVU at the start of the fit.
    """
    starts = {layer: fit["fvu_start"] for layer, fit in fits.items() if "fvu_start" in fit}
    columns = {score: column for score, column in FIT_COLUMNS.items() if score != "fvu_start" or starts}
    rows = {
        str(layer): of_row(scores, columns) | {"fvu_start": starts.get(layer)}
        for layer, scores in evaluation.layers.items()
    }
    means = {score: evaluation.mean(score) for score in columns if score != "fvu_start"} | evaluation.mean_se
    rows["mean"] = means | {"fvu_start": fmean(starts.values()) if starts else None}
    title = f"held-out text: {evaluation.tokens:,} tokens of {evaluation.dataset} ({evaluation.split})"
    kept = [
        f"layer {layer} is as the fit began with it: its steps ended with a higher FVU"
        + (f", {fit['fvu_end']:.4f}" if "fvu_end" in fit else "")
        for layer, fit in fits.items()
        if fit.get("kept") == "start"
    ]
    return "\n".join([title, table("layer", columns, rows), *kept, *remarks(evaluation)])


def remarks(evaluation: Evaluation) -> Iterator[str]:
    """A sentence for each layer with massive tokens, or with a channel that carries the error."""
    for layer, scores in evaluation.layers.items():
        if scores.massive_share:
            yield (
                f"layer {layer}: {scores.massive_share:.2%} of the tokens are massive, with a relative error of "
                f"{scores.massive_error:.4f}"
            )
        if worst := scores.worst_channel:
            yield f"layer {layer}: output channel {worst['index']} carries {worst['share']:.0%} of the squared error"


def loss_table(evaluation: Evaluation) -> str:
    """The table of what the base loses with its MLPs replaced."""
    rows = {str(layer): of_row(scores, LOSS_COLUMNS) for layer, scores in evaluation.layers.items()}
    rows["all"] = of_row(evaluation.all_layers, LOSS_COLUMNS)
    tokens = "" if evaluation.loss_tokens is None else f", over {evaluation.loss_tokens:,} predicted"
    lines = [
        f"the base's own loss: {evaluation.base_ce:.4f} nats a token{tokens}",
        table("replaced", LOSS_COLUMNS, rows),
    ]
    if continued := evaluation.continuations:
        error = "" if continued.same_mean_se is None else f" ±{continued.same_mean_se:.1f}"
        lines.append(
            f"greedy continuations of {continued.prompts} held-out prompts, all replaced: of {continued.tokens} "
            f"tokens, the first that is not the base's is number {continued.same_median:g} (median) or "
            f"{continued.same_mean:.1f}{error} (mean), counted from 0"
        )
    return "\n".join(lines)


def of_row(scores: object, columns: Columns) -> dict[str, Any]:
    """Of an object's scores those with a column, and their standard errors."""
    return {name: getattr(scores, name, None) for score in columns for name in (score, f"{score}_se")}


def table(first: str, columns: Columns, rows: Mapping[str, Mapping[str, float | None]]) -> str:
    """Rows of scores under their headings, ± their standard errors, aligned to the right; a dash for what was not
    measured."""
    lines = {first: [heading for heading, _ in columns.values()]}
    lines |= {name: [cell(scores, score, columns[score][1]) for score in columns] for name, scores in rows.items()}
    widths = [max(8, *map(len, column)) for column in zip(*lines.values(), strict=True)]
    return "\n".join(
        "  ".join([f"{name:>{len(first)}}", *(f"{c:>{w}}" for c, w in zip(cells, widths, strict=True))])
        for name, cells in lines.items()
    )


def cell(scores: Mapping[str, float | None], score: str, form: str) -> str:
    value, error = scores[score], scores.get(f"{score}_se")
    return "–" if value is None else format(value, form) + ("" if error is None else f" ±{error:{form}}")
