"""What a run's scores show, in sentences, from its own numbers only."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from statistics import fmean

import numpy as np

from bilinear_tc.train.measuring.evaluation import Evaluation
from bilinear_tc.upload.tables import (
    best_and_hardest,
    consecutive,
    format_fvu,
    format_nats,
    format_percent,
    format_range,
    fvu_words,
    headline,
    layer_ranges,
    like_layers,
)

# A cosine below this leaves, at any scale, more than half of the derivative's squared norm unexplained: 1 − cosine².
LOW_COSINE = 0.5**0.5
MOSTLY = 0.5


def findings(scores: Evaluation) -> list[str]:
    """Sentences in Markdown that hold for these scores, the most important first."""
    if len(scores.layers) == 1:
        sentences: list[str | None] = [only_layer(scores)]
    else:
        sentences = [extremes(scores), alike(scores), by_depth(scores)]
    sentences += [beside_affine(scores), derivative(scores), massive_tokens(scores), worst_channels(scores)]
    return [s for s in (*sentences, by_position(scores), loss_one(scores), loss_all(scores)) if s]


def only_layer(scores: Evaluation) -> str:
    ((layer, fvu),) = scores.values(headline(scores)).items()
    return (
        f"**Layer {layer}'s transcoder explains {format_percent(1 - fvu)}** of the variance of its MLP's output "
        f"({fvu_words(scores)} {format_fvu(fvu)})."
    )


def extremes(scores: Evaluation) -> str:
    fvu = scores.values(headline(scores))
    best, hardest = best_and_hardest(scores)
    apart = f", {fvu[hardest] / fvu[best]:.1f} times as much" if fvu[best] > 0 else ""

    def scored(layer: int) -> str:
        return (
            f"{fvu_words(scores)} {format_fvu(fvu[layer])}, {format_percent(1 - fvu[layer])} of the variance explained"
        )

    return (
        f"**Layer {best} is the easiest to approximate** ({scored(best)}) and **layer {hardest} the hardest** "
        f"({scored(hardest)}{apart} unexplained)."
    )


def alike(scores: Evaluation) -> str | None:
    """The largest group of like layers, if it holds at least half of them."""
    fvu = scores.values(headline(scores))
    group = max(like_layers(fvu), key=len)
    if len(group) < max(3, len(fvu) / 2):
        return None
    values = [fvu[layer] for layer in group]
    return (
        f"**Layers {layer_ranges(group)} are alike**: their {fvu_words(scores)} stays between "
        f"{format_fvu(min(values))} and {format_fvu(max(values))}."
    )


def by_depth(scores: Evaluation) -> str | None:
    """Mean FVU of the early, middle and late third, if the layers are consecutive and at least six."""
    fvu = scores.values(headline(scores))
    if len(fvu) < 6 or len(consecutive(list(fvu))) > 1:
        return None
    thirds = [third.tolist() for third in np.array_split(list(fvu), 3)]
    means = [
        f"{format_fvu(fmean(fvu[layer] for layer in third))} over layers {layer_ranges(third)}" for third in thirds
    ]
    return f"**By depth**, the mean {fvu_words(scores)} is {means[0]}, {means[1]} and {means[2]}."


def derivative(scores: Evaluation) -> str | None:
    """How near the Jacobians come, if that was measured at every layer."""
    cosines = scores.values("jacobian_cosine")
    mean, ceiling = scores.mean("jacobian_cosine"), scores.mean("jacobian_ceiling")
    if mean is None:
        return None
    reach = "" if ceiling is None else f" Fitted to the derivative alone, this form and width reach {ceiling:.3f}."
    if len(cosines) == 1:
        return f"**Its derivative** follows the MLP's with a cosine of {mean:.3f}.{reach}"
    worst, best = min(cosines, key=cosines.__getitem__), max(cosines, key=cosines.__getitem__)
    return (
        f"**The derivatives** follow the MLPs' with a cosine of {mean:.3f} on average, from {cosines[worst]:.3f} at "
        f"layer {worst} to {cosines[best]:.3f} at layer {best}.{reach}"
    )


def massive_tokens(scores: Evaluation) -> str | None:
    """Where the two FVUs are of different tokens, how the massive ones fare, and where they flatter most."""
    shares = {layer: share for layer, share in scores.values("massive_share").items() if share}
    if not shares:
        return None
    errors, ordinary = scores.values("massive_error"), scores.values("fvu_ordinary")
    sentence = f"**Massive tokens**, at most {format_percent(max(shares.values()))} of all, are in {of_layers(shares)}"
    sentence += f"; their own relative error is at most {format_fvu(max(errors.values()))}." if errors else "."
    hidden = {layer: ordinary[layer] - scores.layers[layer].fvu for layer in shares if layer in ordinary}
    if hidden and max(hidden.values()) > 0:
        most = max(hidden, key=hidden.__getitem__)
        sentence += (
            f" They hide most at layer {most}, whose FVU is {format_fvu(scores.layers[most].fvu)} on all tokens and "
            f"{format_fvu(ordinary[most])} on ordinary ones."
        )
    return sentence


def worst_channels(scores: Evaluation) -> str | None:
    """Where one output channel carries most of the error."""
    listed = [
        f"channel {own.worst_channel['index']:.0f} at layer {layer} ({own.worst_channel['share']:.0%})"
        for layer, own in scores.layers.items()
        if own.worst_channel
    ]
    return f"**One output channel** carries most of the squared error: {', '.join(listed)}." if listed else None


def by_position(scores: Evaluation) -> str | None:
    """The mean error at the first and at the last tokens of a sequence, if every layer has it."""
    tables = [own.error_by_position or {} for own in scores.layers.values()]
    places = [place for place in tables[0] if all(place in table for table in tables)]
    if len(places) < 2:
        return None
    first, last = (f"{format_fvu(fmean(table[place] for table in tables))}" for place in (places[0], places[-1]))
    return (
        f"**By position** in the sequence, the mean error of an ordinary token is {first} at token {places[0]} and "
        f"{last} at tokens {places[-1]}, counted from 0."
    )


def distrust(scores: Evaluation) -> Iterator[str]:
    """When not to trust a reading of these weights, by what was measured; the layers are named."""
    cosines = scores.values("jacobian_cosine")
    if not cosines:
        yield "How near the derivatives come to the MLPs', on which reading weights rests, has not been measured."
    if low := {layer: cosine for layer, cosine in cosines.items() if cosine < LOW_COSINE}:
        worst = min(low, key=low.__getitem__)
        yield (
            f"**Do not take the weights of {of_layers(low)} for the MLP's computation.** The Jacobian cosine is below "
            f"{LOW_COSINE:.2f} there (lowest: {low[worst]:.3f}, layer {worst}): more than half of the MLP's derivative "
            "is missing from the transcoder's, at any scale, although the outputs agree on such text."
        )
    refuted: dict[int, str] = {}
    for layer, own in scores.layers.items():
        r2 = (own.interchange or {}) | ({} if own.halfway is None else {"half way to another token": own.halfway})
        if wrong := sorted((part for part in r2 if r2[part] <= 0), key=r2.__getitem__):
            more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
            refuted[layer] = f"layer {layer} ({wrong[0]}, R² {r2[wrong[0]]:.3f}{more})"
    if refuted:
        yield (
            f"**Do not predict interventions with {of_layers(refuted)}.** When a part of the MLP's input comes from "
            f"another token, the change that is predicted is no better than none: {', '.join(refuted.values())}."
        )
    shares = scores.values("low_variance_share")
    if hidden := {layer: share for layer, share in shares.items() if share > MOSTLY}:
        extent = format_range(hidden.values(), "{:.0%}".format)
        yield (
            f"**The top eigenvectors of {of_layers(hidden)}** lie mostly ({extent}) in input directions that carry 3% "
            "of the variance, where the text hardly tests them."
        )
    if cosines and not (low or refuted or hidden):
        passed = [f"the Jacobian cosine is at least {LOW_COSINE:.2f}"]
        passed += ["every interchange R² is above 0"] * bool(scores.values("interchange"))
        passed += ["the top eigenvectors lie mostly where the inputs vary"] * bool(shares)
        yield f"Nothing that was measured speaks against reading these weights: {', '.join(passed)}."


def of_layers(layers: Collection[int]) -> str:
    return f"layer{'s' if len(layers) > 1 else ''} {layer_ranges(sorted(layers))}"


def beside_affine(scores: Evaluation) -> str | None:
    """What the products buy over the best affine map, if that was measured at every layer."""
    fvu, affine = scores.values("fvu"), scores.values("fvu_linear")
    if set(affine) != set(fvu):
        return None
    mean, affine_mean = fmean(fvu.values()), fmean(affine.values())
    subject = ("mean FVU" if len(fvu) > 1 else "FVU") + " on all tokens" * (headline(scores) != "fvu")
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
    cost = scores.values("ce_increase")
    if set(cost) != set(scores.layers):
        return None
    least, most = min(cost, key=cost.__getitem__), max(cost, key=cost.__getitem__)
    if least == most:
        rise = format_nats(cost[most])
        return f"**In the base**, this transcoder in its MLP's place raises the loss by {rise} nats a token."
    _, hardest = best_and_hardest(scores)
    same = "also" if most == hardest else f"not layer {hardest},"
    return (
        "**In the base**, one transcoder in its MLP's place raises the loss by "
        f"{format_nats(cost[least])} (layer {least}) to {format_nats(cost[most])} (layer {most}) nats a token; the "
        f"costliest layer to replace is {same} the one with the highest {fvu_words(scores)}."
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
    agrees = (
        f", and its most likely next token stays the same at {format_percent(together.top1)} of the tokens"
        if together.top1 is not None
        else ""
    )
    return (
        f"**With all {len(scores.layers)} MLPs replaced at once**, the base's loss rises{before} by "
        f"{format_nats(together.ce_increase)} nats a token{agrees}{recovered}."
    )
