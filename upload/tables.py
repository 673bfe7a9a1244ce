"""The card's tables, as rows of cells with the header first, and the formats of their numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import groupby
from statistics import fmean

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
    return low if low == high else f"{low.removesuffix('%')}–{high}"


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


COLUMNS: dict[str, tuple[str, Callable[[float], str]]] = {  # a score of a layer: its column's name and format
    "fvu": ("FVU", format_fvu),
    "variance_explained": ("Variance explained", format_percent),
    "fvu_raw": ("FVU, raw outputs", format_fvu),
    "fvu_linear": ("FVU, best affine map", format_fvu),
    "mse": ("MSE", format_fvu),
    "ce_increase": ("Loss increase (nats)", partial(format_nats, sign="+")),
    "kl": ("KL (nats)", "{:.4f}".format),
    "loss_recovered": ("Loss recovered", format_percent),
}
SUMMARIZED = ("fvu", "variance_explained", "fvu_linear")


def measured_columns(scores: Evaluation, names: Iterable[str]) -> dict[str, dict[int, float]]:
    """Those of these scores that every layer has: name → values by layer."""
    columns = {name: scores.values(name) for name in names}
    return {name: values for name, values in columns.items() if len(values) == len(scores.layers)}


def summary_table(scores: Evaluation) -> list[list[str]]:
    """Consecutive layers of like FVU, the best and the hardest marked, then the average."""
    columns = measured_columns(scores, SUMMARIZED)
    fvu = columns["fvu"]
    best, hardest = min(fvu, key=fvu.__getitem__), max(fvu, key=fvu.__getitem__)
    rows = [["Layers", *(COLUMNS[name][0] for name in columns), "Notes"]]
    for group in like_layers(fvu):
        marked = [
            mark if len(group) == 1 else f"{mark}: layer {layer}"
            for mark, layer in (("best", best), ("hardest", hardest))
            if layer in group and len(fvu) > 1
        ]
        cells = [format_range((v[layer] for layer in group), COLUMNS[name][1]) for name, v in columns.items()]
        rows.append([layer_ranges(group), *cells, "; ".join(marked)])
    if len(fvu) > 1:
        average = [COLUMNS[name][1](fmean(values.values())) for name, values in columns.items()]
        rows.append([*(f"**{cell}**" for cell in ("average", *average)), ""])
    return rows


def full_table(scores: Evaluation) -> list[list[str]]:
    """Every layer, every score that all layers have, and the means."""
    columns = measured_columns(scores, COLUMNS)
    rows = [["Layer", *(COLUMNS[name][0] for name in columns)]]
    for layer in scores.layers:
        rows.append([str(layer), *(COLUMNS[name][1](values[layer]) for name, values in columns.items())])
    if len(scores.layers) > 1:
        rows.append(["mean", *(COLUMNS[name][1](fmean(values.values())) for name, values in columns.items())])
    return rows


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
