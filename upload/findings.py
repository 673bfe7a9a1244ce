"""What a run's scores show, in sentences, from its own numbers only."""

from __future__ import annotations

from statistics import fmean

import numpy as np

from bilinear_tc.train.measuring.evaluation import Evaluation
from bilinear_tc.upload.tables import consecutive, format_fvu, format_nats, format_percent, layer_ranges, like_layers


def findings(scores: Evaluation) -> list[str]:
    """Sentences in Markdown that hold for these scores, the most important first."""
    if len(scores.layers) == 1:
        sentences: list[str | None] = [only_layer(scores)]
    else:
        sentences = [extremes(scores), alike(scores), by_depth(scores)]
    return [s for s in (*sentences, beside_affine(scores), loss_one(scores), loss_all(scores)) if s]


def only_layer(scores: Evaluation) -> str:
    ((layer, only),) = scores.layers.items()
    return (
        f"**Layer {layer}'s transcoder explains {format_percent(only.variance_explained)}** of the variance of its "
        f"MLP's output (FVU {format_fvu(only.fvu)})."
    )


def extremes(scores: Evaluation) -> str:
    fvu = scores.values("fvu")
    best, hardest = min(fvu, key=fvu.__getitem__), max(fvu, key=fvu.__getitem__)
    apart = f", {fvu[hardest] / fvu[best]:.1f} times as much" if fvu[best] > 0 else ""

    def scored(layer: int) -> str:
        return f"FVU {format_fvu(fvu[layer])}, {format_percent(1 - fvu[layer])} of the variance explained"

    return (
        f"**Layer {best} is the easiest to approximate** ({scored(best)}) and **layer {hardest} the hardest** "
        f"({scored(hardest)}{apart} unexplained)."
    )


def alike(scores: Evaluation) -> str | None:
    """The largest group of like layers, if it holds at least half of them."""
    fvu = scores.values("fvu")
    group = max(like_layers(fvu), key=len)
    if len(group) < max(3, len(fvu) / 2):
        return None
    values = [fvu[layer] for layer in group]
    return (
        f"**Layers {layer_ranges(group)} are alike**: their FVU stays between {format_fvu(min(values))} and "
        f"{format_fvu(max(values))}."
    )


def by_depth(scores: Evaluation) -> str | None:
    """Mean FVU of the early, middle and late third, if the layers are consecutive and at least six."""
    fvu = scores.values("fvu")
    if len(fvu) < 6 or len(consecutive(list(fvu))) > 1:
        return None
    thirds = [third.tolist() for third in np.array_split(list(fvu), 3)]
    means = [
        f"{format_fvu(fmean(fvu[layer] for layer in third))} over layers {layer_ranges(third)}" for third in thirds
    ]
    return f"**By depth**, the mean FVU is {means[0]}, {means[1]} and {means[2]}."


def beside_affine(scores: Evaluation) -> str | None:
    """What the products buy over the best affine map, if that was measured at every layer."""
    fvu, affine = scores.values("fvu"), scores.values("fvu_linear")
    if set(affine) != set(fvu):
        return None
    mean, affine_mean = fmean(fvu.values()), fmean(affine.values())
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


def loss_one(scores: Evaluation) -> str | None:
    """What it costs the base to run with one layer's transcoder, if that was measured at every layer."""
    cost, fvu = scores.values("ce_increase"), scores.values("fvu")
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


def loss_all(scores: Evaluation) -> str | None:
    """What it costs the base to run with all transcoders at once, if that was measured."""
    together = scores.all_layers
    if len(scores.layers) == 1 or together is None:
        return None
    before = f" from {scores.base_ce:.4f}" if scores.base_ce is not None else ""
    recovered = (
        f"; {format_percent(together.loss_recovered)} of the loss that MLPs replaced by their mean output cost is "
        "recovered"
        if together.loss_recovered is not None
        else ""
    )
    return (
        f"**With all {len(scores.layers)} MLPs replaced at once**, the base's loss rises{before} by "
        f"{format_nats(together.ce_increase)} nats a token{recovered}."
    )
