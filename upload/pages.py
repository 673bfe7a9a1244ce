"""Static pages of what was read of a set: one HTML file a layer, which needs nothing beside itself."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import torch

from bilinear_tc.train.files import written_whole
from bilinear_tc.train.measuring.evaluation import Evaluation
from bilinear_tc.train.recipe import Recipe
from bilinear_tc.upload.contexts import Context
from bilinear_tc.upload.directions import Reading
from bilinear_tc.upload.findings import distrust
from bilinear_tc.upload.names import described_base, described_text, split_name
from bilinear_tc.upload.reading import LayerReading, SetReading, Writer
from bilinear_tc.upload.tables import format_component, format_fvu
from bilinear_tc.upload.vocabulary import Vocabulary

PAGES = "pages"
SHADES = 5
UNREADABLE = {"\n": "↵", "\r": "␍", "\t": "⇥"}
WIDTH, HEIGHT = 360, 110  # of a spectrum, in its own units
NORMS = {"layernorm": "LayerNorm", "rmsnorm": "RMSNorm"}
METRICS = {"covariance": "the inputs' covariance", "variances": "the inputs' variances"}


def page_name(layer: int) -> str:
    return f"layer_{layer}.html"


def write_pages(
    read: SetReading, folder: Path, base: str | None, held_out: Recipe, scores: Evaluation | None
) -> list[Path]:
    """Writes a page for each layer that was read into a folder, and returns them; pages of other layers there stay.

    The same readings give the same bytes. StorageError if the folder cannot be written.

    Args:
        read: what was read.
        folder: where the pages go; they link to one another, and to those that are there already.
        base: what the base is called.
        held_out: the recipe whose text was read.
        scores: what was measured of the set on held-out text, if anything was.
    """
    there = {page: re.fullmatch(r"layer_(\d+)", page.stem) for page in folder.glob("layer_*.html")}
    anchors = {int(match[1]): anchors_in(page) for page, match in there.items() if match}
    anchors |= {of.layer: {feature.anchor for feature in of.features} for of in read.layers}
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    template = environment.get_template("page.html.jinja")
    with written_whole(folder) as scratch:
        for of in read.layers:
            context = page_context(of, read.vocabulary, anchors, scores)
            context |= {
                "base": described_base(base)["short"],
                "text": described_text(held_out.dataset)["name"],
                "split": split_name(held_out.eval_split or "", held_out.dataset),
            }
            (scratch / page_name(of.layer)).write_text(template.render(context), encoding="utf-8", newline="\n")
    return [folder / page_name(of.layer) for of in read.layers]


def anchors_in(page: Path) -> set[str]:
    return set(re.findall(r'\bid="([\w-]+)"', page.read_text(encoding="utf-8", errors="replace")))


def page_context(
    of: LayerReading, vocabulary: Vocabulary, anchors: Mapping[int, set[str]], scores: Evaluation | None
) -> dict[str, Any]:
    """Everything that a layer's page prints, but for the names of base and text."""
    scores = scores.only([of.layer]) if scores is not None and of.layer in scores.layers else None
    unmeasured = ["How near this layer comes to its MLP has not been measured: run train/evaluate.py."]
    own = zip(of.readings, of.fvu(), strict=True)
    readings, start = [], 0
    for reading, fvu in own:
        readings.append(reading_context(of, reading, start, fvu, vocabulary, anchors))
        start += len(reading.features)
    norm = of.transcoder.config.input_norm
    return {
        "layer": of.layer,
        "tokens_read": f"{of.tokens:,}",
        "left_out": f"{of.tokens - of.spread.seen:,}" if of.tokens > of.spread.seen else None,
        "others": sorted(set(anchors) - {of.layer}),
        "distrust": unmeasured if scores is None else [*trust(scores, of.layer)],
        "measures": [] if scores is None else [*measures(scores, of.layer)],
        "norm": None if norm is None else NORMS[norm],
        "readings": readings,
    }


def trust(scores: Evaluation, layer: int) -> Iterator[str]:
    """When not to trust a reading of the layer, a sentence each."""
    for sentence in distrust(scores):
        yield sentence.replace("**", "")
    errors = scores.layers[layer].error_quantiles or {}
    if "50" in errors and "99" in errors:
        yield (
            f"Do not trust it of a single token: an ordinary token's own error, in the FVU's unit, is "
            f"{format_fvu(errors['50'])} in the median, but {format_fvu(errors['99'])} or more at one in a hundred."
        )


def measures(scores: Evaluation, layer: int) -> Iterator[tuple[str, str]]:
    """What was measured of the layer, and its value, for a reader."""
    own = scores.layers[layer]
    ordinary = own.fvu if own.fvu_ordinary is None else own.fvu_ordinary
    yield "FVU on ordinary tokens" if own.fvu_ordinary is not None else "FVU", format_fvu(ordinary)
    for label, value in (
        ("FVU of the best affine map", own.fvu_linear),
        ("Jacobian cosine", own.jacobian_cosine),
        ("The same along differences of tokens", own.jacobian_cosine_data),
        ("Eigenvectors in low-variance directions", own.low_variance_share),
        ("Mean interchange R²", own.interchange_mean),
    ):
        if value is not None:
            yield label, f"{value:.3f}"
    if own.interchange:
        yield "Worst interchange R²", format_component(own.interchange)


def reading_context(
    of: LayerReading,
    reading: Reading,
    start: int,
    fvu: float | None,
    vocabulary: Vocabulary,
    anchors: Mapping[int, set[str]],
) -> dict[str, Any]:
    """What a page prints of one reading, whose features are the layer's from number `start` on."""
    spectrum, spread = reading.spectrum, of.spread
    shares = torch.cat([spectrum.share[:1], spectrum.share.diff()]).tolist()
    values = spectrum.eigenvalues.tolist()
    features = [
        {
            "name": feature.name,
            "anchor": feature.anchor,
            "high": shaded(of.contexts.of(start + i, 1), of.contexts.of(start + i, -1), vocabulary),
            "low": shaded(of.contexts.of(start + i, -1), of.contexts.of(start + i, 1), vocabulary),
            "writers": [writer_context(w, of.layer, anchors) for w in of.writers.get(feature.anchor, [])],
        }
        for i, feature in enumerate(reading.features)
    ]
    for feature, value, share in zip(features[1:], values, shares, strict=False):
        feature |= {"value": number(value), "share": f"{share:.1%}"}
    raised, lowered = ([readable(text) for text in side] for side in vocabulary.moved(reading.features[0].raises))
    moments = spread.moments
    return {
        "features": features,
        "unit": reading.unit is not None,
        "difference": "−" in reading.features[0].name,
        "raised": raised,
        "lowered": lowered,
        "constant": number(spectrum.constant.item()),
        "mean": number(moments.mean[start].item()),
        "std": number(moments.std[start].item()),
        "low": number(spread.low[start].item()),
        "high": number(spread.high[start].item()),
        "fvu": None if fvu is None else f"{fvu:.1%}",
        "metric": METRICS[spectrum.metric],
        **bars(values),
        **stacked(reading.linear_share, shares),
    }


def bars(values: Sequence[float]) -> dict[str, Any]:
    """Where the bars of a spectrum stand, up from the axis or down."""
    high, low = max(0.0, *values), -min(0.0, *values)
    unit, step = HEIGHT / max(high + low, 1e-30), WIDTH / max(len(values), 6)
    zero = 14 + high * unit
    drawn = []
    for i, value in enumerate(values):
        height = abs(value) * unit
        top = zero - height if value > 0 else zero
        drawn.append(
            {
                "look": "up" if value > 0 else "down",
                "x": round(i * step + 2, 1),
                "y": round(top, 1),
                "width": round(step - 4, 1),
                "height": round(height, 1),
                "text": round(top - 3 if value > 0 else top + height + 11, 1),
                "label": number(value),
                "short": f"{value:.2g}".replace("-", "−"),
            }
        )
    return {"bars": drawn, "spectrum": {"height": HEIGHT + 28, "zero": round(zero, 1)}}


def stacked(linear: float, terms: Sequence[float]) -> dict[str, Any]:
    """One bar of the variance's shares: the linear part, each quadratic term that is shown, and the rest."""
    rest = max(0.0, 1 - linear - sum(terms))
    parts, x = [], 0.0
    for look, label, share in (
        ("linear", "linear part", linear),
        *(("term", f"quadratic term {i + 1}", share) for i, share in enumerate(terms)),
        ("rest", "other quadratic terms", rest),
    ):
        width = round(WIDTH * share, 2)
        parts.append({"look": look, "x": round(x, 2), "width": width, "label": f"{label}: {share:.1%}"})
        x += WIDTH * share
    legend = [
        ("linear", f"linear part {linear:.0%}"),
        ("term", f"these {len(terms)} quadratic terms {sum(terms):.0%}"),
        *([("rest", f"all others {rest:.0%}")] if rest > 0.005 else []),
    ]
    return {"parts": parts, "legend": legend, "shares": ", ".join(label for _, label in legend)}


def writer_context(writer: Writer, layer: int, anchors: Mapping[int, set[str]]) -> dict[str, Any]:
    anchor = f"unit-{writer.unit}"
    there = anchor in anchors.get(writer.layer, set())
    return {
        "name": f"unit {writer.unit} of layer {writer.layer}",
        "href": f"{page_name(writer.layer)}#{anchor}" if there else None,
        "sign": "+" if writer.sign > 0 else "−",
        "share": f"{writer.share:.1%}",
    }


def shaded(contexts: Sequence[Context], others: Sequence[Context], vocabulary: Vocabulary) -> list[dict[str, Any]]:
    """Contexts of one sign as a page shows them, their shades relative to the largest value of both signs' peaks."""
    most = max((abs(context.value) for context in (*contexts, *others)), default=0.0) or 1.0
    rows = []
    for context in contexts:
        tokens = []
        for place, (token, value) in enumerate(zip(context.tokens, context.values, strict=True)):
            level = min(SHADES, round(SHADES * abs(value) / most))
            looks = [f"{'p' if value > 0 else 'n'}{level}"] * bool(level) + ["peak"] * (place == context.peak)
            tokens.append({"text": readable(vocabulary.text(token)), "value": number(value), "shade": " ".join(looks)})
        rows.append({"value": number(context.value), "tokens": tokens})
    return rows


def readable(text: str) -> str:
    """A token's text with a sign for each character that cannot be seen."""
    shown = "".join(UNREADABLE.get(c, c if c.isprintable() else f"\\x{ord(c):02x}") for c in text)
    return shown or "∅"


def number(value: float) -> str:
    return f"{value:.3g}".replace("-", "−")
