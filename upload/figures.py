"""The figures of a run: all layers side by side, and their training curves.

`python upload/figures.py RUN` writes them into RUN/figures.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from bilinear_tc.train.errors import command_line
from bilinear_tc.train.files import written_whole
from bilinear_tc.train.measuring.evaluation import Evaluation
from bilinear_tc.train.run import Run
from bilinear_tc.upload.tables import best_and_hardest, format_fvu, fvu_words, headline, layer_ranges

FIGURES = "figures"
COMPARISON = "all_layers_comparison.png"
DERIVATIVES = "derivatives_by_layer.png"
CURVES_STEM = "training_curves_overlaid_layers"
LAYERS_A_FIGURE = 6

Lines = dict[str, tuple[dict[int, float], dict[str, Any]]]  # by name: values by layer, and their look

STYLE = Path(__file__).with_suffix(".mplstyle")
BILINEAR: dict[str, Any] = {"color": "#0b4f8a", "marker": "o", "linestyle": "-"}
BESIDE: dict[str, Any] = {"color": "#009e73", "marker": "D", "linestyle": (0, (1, 1)), "markerfacecolor": "white"}
BESIDE["zorder"] = 1.9  # below the line that it may coincide with
AFFINE: dict[str, Any] = {"color": "#c2570c", "marker": "s", "linestyle": (0, (3, 1.5)), "markerfacecolor": "white"}

# Colors from Okabe and Ito's color-blind-safe set (its yellow and sky blue left out, too pale for print);
# line style and marker tell the six apart without them.
CURVES: tuple[dict[str, Any], ...] = (
    {"color": "#000000", "linestyle": "-", "marker": "o"},
    {"color": "#d55e00", "linestyle": "-", "marker": "s", "markerfacecolor": "white"},
    {"color": "#0072b2", "linestyle": (0, (5, 1.5)), "marker": "^"},
    {"color": "#a3457a", "linestyle": (0, (5, 1.5)), "marker": "v", "markerfacecolor": "white"},
    {"color": "#009e73", "linestyle": (0, (1, 1)), "marker": "D"},
    {"color": "#7a5c00", "linestyle": (0, (1, 1)), "marker": "P", "markerfacecolor": "white"},
)


def draw_figures(run: Run, folder: Path) -> list[Path]:
    """Draws a run's figures into a folder, and deletes training curves of an earlier set of layers from it.

    UserError if the run has no layers, a layer has neither held-out scores nor a history, or the folder cannot be
    written.

    Returns:
        The files written: `all_layers_comparison.png`; `derivatives_by_layer.png`, if the derivatives were measured;
        then `training_curves_overlaid_layers_{a}_{b}.png` for every six layers that have a training history (a fit of
        no steps has none).
    """
    with written_whole(folder) as scratch, matplotlib.rc_context(fname=STYLE):
        save(comparison(run.scores), scratch / COMPARISON)
        names = [COMPARISON]
        if run.scores.values("jacobian_cosine"):
            save(derivatives(run.scores), scratch / DERIVATIVES)
            names.append(DERIVATIVES)
        for six in sixes(run.layers):
            if curves := {layer: run.history(layer) for layer in six if len(run.history(layer)["step"])}:
                save(training_curves(curves), scratch / curves_name(six))
                names.append(curves_name(six))
    drawn = {DERIVATIVES, *(path.name for path in folder.glob(f"{CURVES_STEM}_*.png"))}
    for stale in {name for name in drawn if (folder / name).is_file()} - set(names):
        (folder / stale).unlink()
    return [folder / name for name in names]


def sixes(layers: Sequence[int]) -> Iterator[Sequence[int]]:
    """The layers, six at a time."""
    for start in range(0, len(layers), LAYERS_A_FIGURE):
        yield layers[start : start + LAYERS_A_FIGURE]


def curves_name(layers: Sequence[int]) -> str:
    """File name of the training curves of these layers."""
    return f"{CURVES_STEM}_{layers[0]}_{layers[-1]}.png"


def described_figures(run: Run) -> Iterator[dict[str, str]]:
    """File name, alternative text and caption of each figure that a run can have."""
    scores, affine = run.scores, run.scores.mean("fvu_linear")
    fvu, (best, hardest) = scores.values(headline(scores)), best_and_hardest(scores)
    ordinary = headline(scores) != "fvu"
    measured, name = f"{origin(scores)} FVU" + " on ordinary tokens and on all" * ordinary, fvu_words(scores)
    extent = (
        f"{name} runs from {format_fvu(fvu[best])} at layer {best} to {format_fvu(fvu[hardest])} at layer {hardest}"
        if best != hardest
        else f"{name} is {format_fvu(fvu[best])} at layer {best}"
    )
    average = " on average" if len(fvu) > 1 else ""
    beside = f"; the best affine map's is {format_fvu(affine)}{average}" if affine is not None else ""
    beside_map = " beside the best affine map of the same input" if scores.values("fvu_linear") else ""
    yield {
        "name": COMPARISON,
        "alt": f"{measured} (log scale) and variance explained by layer. {extent}{beside}.",
        "caption": f"{measured}, and variance explained, of every layer{beside_map}."
        + " Where the two FVUs part, a few massive tokens carry the one on all tokens." * ordinary,
    }
    cosines, worst = scores.values("jacobian_cosine"), scores.values("interchange_worst")
    if cosines:
        low = min(cosines, key=cosines.__getitem__)
        lowest = min(worst, key=worst.__getitem__) if worst else None
        r2 = "" if lowest is None else f"; the worst interchange R² is lowest at layer {lowest} ({worst[lowest]:.3f})"
        yield {
            "name": DERIVATIVES,
            "alt": f"Jacobian cosine{' and worst interchange R²' if worst else ''} by layer. The cosine is lowest at "
            f"layer {low} ({cosines[low]:.3f}){r2}.",
            "caption": "How far the weights can be read: the cosine of each layer's Jacobian with its MLP's"
            + ", and the lowest R² of a predicted change, where 0 is what predicting none would get" * bool(worst)
            + ".",
        }
    for six in sixes(run.layers):
        ends = {layer: run.final_scores(layer).fvu for layer in six if len(run.history(layer)["step"])}
        values = ", ".join(f"{format_fvu(value)} at layer {layer}" for layer, value in ends.items())
        yield {
            "name": curves_name(six),
            "alt": "Training-batch FVU by optimizer step on a log scale, one curve a layer. The last steps average "
            f"{values}.",
            "caption": f"Training curves, layer{'s' if len(six) > 1 else ''} {layer_ranges(six)}.",
        }


def origin(scores: Evaluation) -> str:
    """What the scores were measured on, as the first word of a label."""
    return "Held-out" if scores.held_out else "Training-batch"


def save(figure: Figure, path: Path) -> None:
    """Writes a figure without the program's version, so that equal figures are equal files."""
    figure.savefig(path, format="png", metadata={"Software": None})


def comparison(scores: Evaluation) -> Figure:
    """FVU (log scale) and variance explained by layer, on ordinary and on all tokens, beside the best affine map's, as
    far as they are known."""
    figure = Figure(figsize=(6.75, 2.7), layout="constrained")
    left, right = figure.subplots(1, 2)
    on_all, affine = scores.values("fvu"), scores.values("fvu_linear")
    lines: Lines = {"bilinear transcoder": (on_all, BILINEAR), "best affine map": (affine, AFFINE)}
    if headline(scores) == "fvu_ordinary":
        ordinary = {"ordinary tokens": (scores.values("fvu_ordinary"), BILINEAR)}
        lines = ordinary | {"all tokens": (on_all, BESIDE), "best affine map, all tokens": (affine, AFFINE)}
    draw_layers(left, lines)
    left.set(yscale="log", ylabel=f"{origin(scores)} FVU")
    log_ticks(left)
    explained = {
        name: ({layer: 100 * (1 - v) for layer, v in fvu.items()}, look) for name, (fvu, look) in lines.items()
    }
    draw_layers(right, explained)
    right.set(ylabel=f"{origin(scores)}\nvariance explained (%)", ylim=(None, 100))
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), handlelength=3.2)
    return figure


def derivatives(scores: Evaluation) -> Figure:
    """Jacobian cosines of every layer and, if they were measured, the R² of predicted changes (below −1 log scale)."""
    cosines, between = scores.values("jacobian_cosine"), scores.values("jacobian_cosine_data")
    worst, halfway = scores.values("interchange_worst"), scores.values("halfway")
    panels: list[Lines] = [{"random directions": (cosines, BILINEAR), "between tokens": (between, BESIDE)}]
    if worst or halfway:
        panels.append({"worst interchange": (worst, BILINEAR), "half way to another token": (halfway, AFFINE)})
    figure = Figure(figsize=(3.4 * len(panels), 2.7), layout="constrained")
    left, *rest = np.atleast_1d(figure.subplots(1, len(panels)))
    draw_layers(left, panels[0], mean=False)
    left.set(ylabel="Jacobian cosine", ylim=(min(0, *cosines.values(), *between.values()), 1))
    for right in rest:
        draw_layers(right, panels[1], mean=False)
        right.axhline(0, color="#404040", linewidth=0.8, zorder=1)
        low = min(-0.2, 1.2 * min(*worst.values(), *halfway.values(), 0))
        below = [-(10.0**power) for power in range(1, 1 + int(np.log10(max(1, -low))))] or [-5, -2]
        right.set_yscale("symlog", linthresh=1)
        right.set(ylabel="R² of the predicted change", ylim=(low, 1))
        right.set_yticks([tick for tick in (*below, -1, -0.5, 0, 0.5, 1) if tick >= low], minor=False)
        right.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        right.yaxis.set_minor_locator(NullLocator())
    sides: list[Literal["outside upper left", "outside upper right"]] = ["outside upper left", "outside upper right"]
    for axes, side in zip((left, *rest), sides, strict=False):
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles, labels, loc=side, ncols=2, handlelength=2.8)
    return figure


def draw_layers(axes: Axes, lines: Lines, mean: bool = True) -> None:
    """One value a layer of each line that has any; the mean of the first dotted."""
    first = next(iter(lines.values()))[0]
    size = 3.8 if len(first) <= 24 else 2.6
    for name, (values, look) in lines.items():
        if values:
            axes.plot(*with_gaps(values), label=name, markersize=size, clip_on=False, **look)
    if mean and len(first) > 1:
        height = float(np.mean(list(first.values())))
        name = f"mean, {next(iter(lines))}"
        axes.axhline(height, color="#404040", linewidth=0.8, linestyle=":", label=name, zorder=1)
    layers = {layer for values, _ in lines.values() for layer in values}
    axes.set(xlabel="Layer", xlim=(min(layers) - 0.7, max(layers) + 0.7))
    if len(layers) <= 12:
        axes.set_xticks(sorted(layers))
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12, steps=[1, 2, 3, 4, 5, 10]))


def with_gaps(values: dict[int, float]) -> tuple[range, list[float]]:
    """Layers and values to plot, with a break in the line where layers between them were not fitted."""
    layers = range(min(values), max(values) + 1)
    return layers, [values.get(layer, float("nan")) for layer in layers]


def training_curves(histories: dict[int, dict[str, np.ndarray]]) -> Figure:
    """FVU of the training batches by step (log scale), a curve a layer, each named with its last value."""
    figure = Figure(figsize=(5.2, 3.1), layout="constrained")
    axes = figure.subplots()
    ends = {}
    window = 1
    for index, (layer, history) in enumerate(histories.items()):
        window = max(1, len(history["fvu"]) // 100)
        steps, fvu = smooth(history["step"], window), smooth(history["fvu"], window)
        curve = CURVES[index]
        # staggered, so that markers of neighboring curves do not hide each other
        every = max(1, len(steps) // 7)
        axes.plot(steps, fvu, markevery=(index * every // LAYERS_A_FIGURE, every), **curve)
        ends[layer] = (float(steps[-1]), float(fvu[-1]), curve["color"])
    mean = f"\n(running mean over {window} steps)" if window > 1 else ""
    axes.set(yscale="log", xlabel="Optimizer step", ylabel=f"Training-batch FVU{mean}")
    axes.margins(x=0.02)
    log_ticks(axes)
    label_ends(axes, ends)
    return figure


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Running mean: [n] → [n − window + 1]."""
    return np.convolve(values, np.full(window, 1 / window), mode="valid")


def log_ticks(axes: Axes) -> None:
    """Plain numbers on a log-scaled y axis, close enough together that there are always several."""
    low, high = axes.get_ylim()
    decades = np.log10(high / low)
    if decades < 0.6:
        axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
    else:
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 2.5 else (1,)))
    axes.yaxis.set_minor_locator(LogLocator(subs=range(1, 10)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def label_ends(axes: Axes, ends: dict[int, tuple[float, float, str]]) -> None:
    """Names each curve (layer: last x, last y, color) at its end, moved apart if they would overlap."""
    low, high = np.log10(axes.get_ylim())
    heights = {layer: (np.log10(y) - low) / (high - low) for layer, (_, y, _) in ends.items()}
    order = sorted(heights, key=heights.__getitem__)
    places = spread([heights[layer] for layer in order], gap=0.062)
    for layer, place in zip(order, places, strict=True):
        x, y, color = ends[layer]
        line = {"arrowstyle": "-", "color": color, "linewidth": 0.5, "relpos": (0, 0.5), "shrinkA": 2, "shrinkB": 3}
        axes.annotate(
            f"layer {layer}:  {y:#.3g}",
            xy=(x, y),
            xytext=(1.06, place),
            textcoords="axes fraction",
            fontsize=7,
            color=color,
            va="center",
            annotation_clip=False,
            arrowprops=line,
        )


def spread(positions: Sequence[float], gap: float) -> list[float]:
    """Moves ascending positions as little as possible (in least squares) until neighbors are `gap` apart.

    With zᵢ = positionᵢ − i·gap the condition says that z does not descend, and the pool-adjacent-violators
    algorithm gives the nearest such z.
    """
    blocks: list[tuple[float, int]] = []  # mean of z, number of positions
    for index, position in enumerate(positions):
        mean, count = position - index * gap, 1
        while blocks and blocks[-1][0] > mean:
            other, others = blocks.pop()
            mean, count = (mean * count + other * others) / (count + others), count + others
        blocks.append((mean, count))
    flat = [mean for mean, count in blocks for _ in range(count)]
    return [z + index * gap for index, z in enumerate(flat)]


def main() -> None:
    parser = argparse.ArgumentParser(description="Draws a run's figures into RUN/figures.")
    parser.add_argument("run", type=Path, metavar="RUN", help="a run, as train/fit.py writes it")
    folder = parser.parse_args().run
    for path in draw_figures(Run.in_folder(folder), folder / FIGURES):
        print(path)


if __name__ == "__main__":
    command_line(main)
