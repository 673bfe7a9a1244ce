"""The card's tables, as rows of cells with the header first, and the formats of their numbers."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import groupby
from typing import Any

from bilinear_tc.configuration_bilinear_tc import BilinearTCConfig
from bilinear_tc.train.measuring.evaluation import Evaluation

LIKE = 2.0  # layers whose FVUs lie within this factor count as alike


def format_fvu(value: float) -> str:
    """Four decimals, or two significant digits if those would be zeros."""
    return f"{value:.4f}" if value == 0 or abs(value) >= 0.001 else f"{value:.1e}"


def format_nats(value: float, sign: str = "-") -> str:
    """Four decimals, without a sign if they are zeros. `sign` "+" shows that of positive values too."""
    return format(round(value, 4) + 0.0, f"{sign}.4f")


def format_percent(value: float) -> str:
    return f"{100 * value:.2f}%"


def format_range(values: Iterable[float], form: Callable[[float], str]) -> str:
    """Lowest and highest value, or one if they print alike."""
    values = list(values)
    low, high = form(min(values)), form(max(values))
    between = " to " if low.startswith("-") else "–"
    return low if low == high else f"{low.removesuffix('%')}{between}{high}"


def format_duration(seconds: float) -> str:
    """In the unit that a reader would say it in."""
    for unit, length in (("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} seconds"


def layer_ranges(layers: Sequence[int]) -> str:
    """Ascending layers as readers write them: [0, 1, 2, 5] → `0–2, 5`."""
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in consecutive(layers))


def consecutive(layers: Sequence[int]) -> list[list[int]]:
    """Ascending layers cut where one is missing: [0, 1, 2, 5] → [[0, 1, 2], [5]]."""
    runs = groupby(enumerate(layers), lambda place: place[1] - place[0])
    return [[layer for _, layer in run] for _, run in runs]


def like_layers(fvu: dict[int, float]) -> list[list[int]]:
    """The fewest groups of consecutive layers in which the highest FVU is at most `LIKE` times the lowest."""
    groups = []
    for run in consecutive(list(fvu)):
        groups.append([run[0]])
        for layer in run[1:]:
            values = [fvu[member] for member in (*groups[-1], layer)]
            if max(values) > LIKE * min(values):
                groups.append([])
            groups[-1].append(layer)
    return groups


def fenced(text: str) -> str:
    """Text as a block of Markdown that shows it as it is, whatever backticks are in it."""
    fence = max(("```", *(f"{run}`" for run in re.findall("`{3,}", text))), key=len)
    return f"{fence}text\n{text}\n{fence}"


def format_component(interchange: dict[str, float]) -> str:
    """The lowest R² of an interchange, and the component that it belongs to."""
    worst = min(interchange, key=interchange.__getitem__)
    return f"{interchange[worst]:.3f} ({worst})"


def format_quantiles(errors: dict[str, float]) -> str:
    return ", ".join(format_fvu(errors[percent]) for percent in ("50", "99") if percent in errors)


Columns = dict[str, tuple[str, Callable[[Any], str]]]  # a score of a layer: its column's name and format
OUTPUT_COLUMNS: Columns = {
    "fvu_ordinary": ("FVU, ordinary tokens", format_fvu),
    "fvu": ("FVU, all tokens", format_fvu),
    "variance_explained": ("Variance explained, all tokens", format_percent),
    "fvu_raw": ("FVU, raw outputs", format_fvu),
    "fvu_linear": ("FVU, best affine map", format_fvu),
    "massive_share": ("Massive tokens", format_percent),
    "massive_error": ("Their relative error", format_fvu),
    "error_quantiles": ("Error of an ordinary token: median, 99%", format_quantiles),
    "ce_increase": ("Loss increase (nats)", partial(format_nats, sign="+")),
    "kl": ("KL (nats)", "{:.4f}".format),
    "top1": ("Top-1 agreement", format_percent),
    "loss_recovered": ("Loss recovered", format_percent),
}
WEIGHT_COLUMNS: Columns = {
    "jacobian_cosine": ("Jacobian cosine", "{:.3f}".format),
    "jacobian_ceiling": ("Its ceiling", "{:.3f}".format),
    "jacobian_error": ("Relative error", "{:.3f}".format),
    "jacobian_cosine_data": ("Cosine between tokens", "{:.3f}".format),
    "jacobian_error_data": ("Error between tokens", "{:.3f}".format),
    "interchange_mean": ("Interchange R², mean", "{:.3f}".format),
    "interchange": ("Interchange R², worst", format_component),
    "halfway": ("R² half way to another token", "{:.3f}".format),
    "low_variance_share": ("Low-variance share", "{:.0%}".format),
}
SUMMARY_COLUMNS: Columns = {
    **{score: OUTPUT_COLUMNS[score] for score in ("fvu_ordinary", "fvu", "fvu_linear")},
    "jacobian_cosine": WEIGHT_COLUMNS["jacobian_cosine"],
    "interchange_worst": ("Interchange R², worst", "{:.3f}".format),
}


def headline(scores: Evaluation) -> str:
    """The score that layers are compared by: FVU on ordinary tokens, if it was measured at every layer."""
    return "fvu" if scores.mean("fvu_ordinary") is None else "fvu_ordinary"


def fvu_words(scores: Evaluation) -> str:
    """What the headline figure is called in a sentence."""
    return "FVU" if headline(scores) == "fvu" else "FVU on ordinary tokens"


def best_and_hardest(scores: Evaluation) -> tuple[int, int]:
    """The layers of lowest and highest headline FVU."""
    fvu = scores.values(headline(scores))
    return min(fvu, key=fvu.__getitem__), max(fvu, key=fvu.__getitem__)


def measured(scores: Evaluation, columns: Columns) -> Columns:
    """The columns in which some layer has anything; FVU goes without "all tokens" where nothing else was measured."""
    kept = {score: column for score, column in columns.items() if score == "fvu" or any(scores.values(score).values())}
    if "fvu_ordinary" in kept:
        return kept
    return {score: (name.removesuffix(", all tokens"), form) for score, (name, form) in kept.items()}


def summary_table(scores: Evaluation) -> list[list[str]]:
    """Consecutive layers of like FVU, the best and the hardest marked, then the average."""
    columns, several = measured(scores, SUMMARY_COLUMNS), len(scores.layers) > 1
    best, hardest = best_and_hardest(scores)
    rows = [["Layers", *(name for name, _ in columns.values()), "Notes"]]
    for group in like_layers(scores.values(headline(scores))):
        marked = [
            mark if len(group) == 1 else f"{mark}: layer {layer}"
            for mark, layer in (("best", best), ("hardest", hardest))
            if layer in group and several
        ]
        found = {score: [v for layer, v in scores.values(score).items() if layer in group] for score in columns}
        cells = [format_range(found[score], form) if found[score] else "–" for score, (_, form) in columns.items()]
        rows.append([layer_ranges(group), *cells, "; ".join(marked)])
    if several:
        rows.append([*(f"**{cell}**" for cell in ("average", *mean_cells(scores, columns))), ""])
    return rows


def full_table(scores: Evaluation, columns: Columns) -> list[list[str]]:
    """Every layer and the means, with their standard errors, in those of the columns that were measured."""
    columns = measured(scores, columns)
    rows = [["Layer", *(name for name, _ in columns.values())]]
    for layer, own in scores.layers.items():
        cells = (cell(getattr(own, s), getattr(own, f"{s}_se", None), form) for s, (_, form) in columns.items())
        rows.append([str(layer), *cells])
    if len(scores.layers) > 1:
        rows.append(["mean", *mean_cells(scores, columns)])
    return rows


def mean_cells(scores: Evaluation, columns: Columns) -> list[str]:
    """Means over the layers of what every layer has as a number."""
    numbers = {s: not any(isinstance(value, dict) for value in scores.values(s).values()) for s in columns}
    means = {score: scores.mean(score) if number else None for score, number in numbers.items()}
    return [cell(means[s], scores.mean_se.get(f"{s}_se"), form) for s, (_, form) in columns.items()]


def cell(value: Any, error: float | None, form: Callable[[Any], str]) -> str:
    if value is None:
        return "–"
    return form(value) + ("" if error is None else f" ± {form(error).lstrip('+')}")


def described_maps(config: BilinearTCConfig) -> str:
    """The widths of the linear maps, and which have biases."""
    alike: dict[tuple[int, int], list[str]] = {}
    for name, (inputs, outputs, _) in config.maps.items():
        alike.setdefault((inputs, outputs), []).append(f"`{name}`")
    maps = [f"{', '.join(names)}: {inputs} → {outputs}" for (inputs, outputs), names in alike.items()]
    biased = [f"`{name}`" for name, (_, _, bias) in config.maps.items() if bias]
    some = f"a bias in {', '.join(biased)} alone" if biased else "no biases"
    maps.append("each with a bias" if len(biased) == len(config.maps) else some)
    return "; ".join(maps)


def count_parameters(config: BilinearTCConfig) -> int:
    return sum(outputs * (inputs + bias) for inputs, outputs, bias in config.maps.values())
