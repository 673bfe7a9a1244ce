"""What a run's scores show: layers of like FVU grouped, and findings in sentences, from its own numbers only."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

import numpy as np

from bilinear_tc.upload.results import Results

LIKE = 2.0  # layers whose FVUs lie within this factor count as alike


def format_fvu(value: float) -> str:
    """Four decimals, or two significant digits where those would be zeros."""
    return f"{value:.4f}" if value == 0 or abs(value) >= 0.001 else f"{value:.1e}"


def format_nats(value: float, sign: str = "-") -> str:
    """Four decimals; what they round to zero is no negative zero. `sign` "+" shows that of positive values too."""
    return format(round(value, 4) + 0.0, f"{sign}.4f")


def format_percent(value: float) -> str:
    return f"{100 * value:.2f}%"


def format_range(values: Iterable[float], form: Callable[[float], str]) -> str:
    """Lowest and highest value, or one where they print alike."""
    values = list(values)
    low, high = form(min(values)), form(max(values))
    return low if low == high else f"{low.removesuffix('%')}–{high}"


def layer_ranges(layers: Sequence[int]) -> str:
    """Ascending layers as readers write them: [0, 1, 2, 5] → `0–2, 5`."""
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in consecutive(layers))


def consecutive(layers: Sequence[int]) -> list[list[int]]:
    """Ascending layers cut where one is missing: [0, 1, 2, 5] → [[0, 1, 2], [5]]."""
    runs = [[layers[0]]]
    for before, layer in pairwise(layers):
        if layer == before + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return runs


def like_layers(fvu: dict[int, float]) -> list[list[int]]:
    """The fewest groups of consecutive layers in which the highest FVU is at most `LIKE` times the lowest."""
    groups = []
    for run in consecutive(list(fvu)):
        group = [run[0]]
        for layer in run[1:]:
            values = [fvu[member] for member in (*group, layer)]
            if max(values) <= LIKE * min(values):
                group.append(layer)
            else:
                groups.append(group)
                group = [layer]
        groups.append(group)
    return groups


def findings(results: Results) -> list[str]:
    """Sentences in Markdown that hold for these scores, the most important first."""
    if len(results.layers) == 1:
        sentences = [only_layer(results)]
    else:
        sentences = [extremes(results), alike(results), by_depth(results)]
    return [s for s in (*sentences, beside_affine(results), loss_one(results), loss_all(results)) if s]


def only_layer(results: Results) -> str:
    ((layer, scores),) = results.layers.items()
    return (
        f"**Layer {layer}'s transcoder explains {format_percent(scores['variance_explained'])}** of the variance of "
        f"its MLP's output (FVU {format_fvu(scores['fvu'])})."
    )


def extremes(results: Results) -> str:
    fvu = results.values("fvu")
    best, hardest = min(fvu, key=fvu.__getitem__), max(fvu, key=fvu.__getitem__)
    apart = f", {fvu[hardest] / fvu[best]:.1f} times as much" if fvu[best] > 0 else ""

    def scored(layer: int) -> str:
        return f"FVU {format_fvu(fvu[layer])}, {format_percent(1 - fvu[layer])} of the variance explained"

    return (
        f"**Layer {best} is the easiest to approximate** ({scored(best)}) and **layer {hardest} the hardest** "
        f"({scored(hardest)}{apart} unexplained)."
    )


def alike(results: Results) -> str | None:
    """The largest group of like layers, where it holds at least half of them."""
    fvu = results.values("fvu")
    group = max(like_layers(fvu), key=len)
    if len(group) < max(3, len(fvu) / 2):
        return None
    values = [fvu[layer] for layer in group]
    return (
        f"**Layers {layer_ranges(group)} are alike**: their FVU stays between {format_fvu(min(values))} and "
        f"{format_fvu(max(values))}."
    )


def by_depth(results: Results) -> str | None:
    """Mean FVU of the early, middle and late third, where the layers are consecutive and at least six."""
    fvu = results.values("fvu")
    if len(fvu) < 6 or len(consecutive(list(fvu))) > 1:
        return None
    thirds = [third.tolist() for third in np.array_split(list(fvu), 3)]
    means = [
        f"{format_fvu(float(np.mean([fvu[layer] for layer in third])))} over layers {layer_ranges(third)}"
        for third in thirds
    ]
    return f"**By depth**, the mean FVU is {means[0]}, {means[1]} and {means[2]}."


def beside_affine(results: Results) -> str | None:
    """What the products buy over the best affine map, where that was measured at every layer."""
    fvu, affine = results.values("fvu"), results.values("fvu_linear")
    if set(affine) != set(fvu):
        return None
    mean, affine_mean = results.mean("fvu"), results.mean("fvu_linear")
    subject = "mean FVU" if len(fvu) > 1 else "FVU"
    sentence = (
        f"**Beside the best affine map** of the same input, whose {subject} is {format_fvu(affine_mean)}, the bilinear "
        f"transcoder's is {format_fvu(mean)}"
    )
    sentence += f", {affine_mean / mean:.1f} times lower" if 0 < mean < affine_mean else ""
    not_better = [layer for layer in fvu if fvu[layer] >= affine[layer]]
    if not_better:
        return f"{sentence}; the affine map is as good or better at layers {layer_ranges(not_better)}."
    gains = {layer: affine[layer] / fvu[layer] for layer in fvu if fvu[layer] > 0}
    if len(gains) > 1:
        least, most = min(gains, key=gains.__getitem__), max(gains, key=gains.__getitem__)
        sentence += (
            f"; the gain is smallest at layer {least} (a factor of {gains[least]:.1f}) and largest at layer {most} "
            f"({gains[most]:.1f})"
        )
    return f"{sentence}."


def loss_one(results: Results) -> str | None:
    """What it costs the base to run with one layer's transcoder, where that was measured at every layer."""
    cost, fvu = results.values("ce_increase"), results.values("fvu")
    if set(cost) != set(fvu):
        return None
    least, most = min(cost, key=cost.__getitem__), max(cost, key=cost.__getitem__)
    if least == most:
        rise = format_nats(cost[most])
        return f"**In the base**, this transcoder in its MLP's place raises the loss by {rise} nats a token."
    hardest = max(fvu, key=fvu.__getitem__)
    same = "also" if most == hardest else f"not layer {hardest},"
    return (
        "**In the base**, one transcoder in its MLP's place raises the loss by "
        f"{format_nats(cost[least])} (layer {least}) to {format_nats(cost[most])} (layer {most}) nats a token; the "
        f"costliest layer to replace is {same} the one with the highest FVU."
    )


def loss_all(results: Results) -> str | None:
    """What it costs the base to run with all transcoders at once, where that was measured."""
    scores = results.all_layers
    if len(results.layers) == 1 or "ce_increase" not in scores:
        return None
    before = f" from {results.base_ce:.4f}" if results.base_ce is not None else ""
    recovered = (
        f"; {format_percent(scores['loss_recovered'])} of the loss that MLPs replaced by their mean output cost is "
        "recovered"
        if "loss_recovered" in scores
        else ""
    )
    return (
        f"**With all {len(results.layers)} MLPs replaced at once**, the base's loss rises{before} by "
        f"{format_nats(scores['ce_increase'])} nats a token{recovered}."
    )
