from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import matplotlib
import numpy as np
import pyarrow.parquet as pq
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.text import Text
from tiny_run import final_fvu, write_tiny_run

from bilinear_tc.train.errors import StorageError, UserError, command_line
from bilinear_tc.train.measuring.evaluation import Evaluation, LayerScores, LossScores
from bilinear_tc.train.run import Run
from bilinear_tc.upload import figures
from bilinear_tc.upload.figures import (
    CURVES,
    FIGURES,
    comparison,
    derivatives,
    draw_figures,
    spread,
    training_curves,
    with_gaps,
)


def draw(run: Path) -> list[Path]:
    """Draws a run's figures where the command does."""
    return draw_figures(Run(run), run / FIGURES)


def names(paths: list[Path]) -> list[str]:
    return [path.name for path in paths]


@pytest.mark.slow
def test_files_are_named_by_the_layers_six_a_figure(tmp_path: Path) -> None:
    written = draw(write_tiny_run(tmp_path / "run", layers=range(24)))
    assert names(written) == [
        "all_layers_comparison.png",
        "derivatives_by_layer.png",
        "training_curves_overlaid_layers_0_5.png",
        "training_curves_overlaid_layers_6_11.png",
        "training_curves_overlaid_layers_12_17.png",
        "training_curves_overlaid_layers_18_23.png",
    ]
    assert all(path.parent == tmp_path / "run" / "figures" for path in written)
    for path in written:
        height, width, _ = imread(path).shape
        assert width >= 1000  # 200 dots an inch at the width of a column
        assert height >= 500


@pytest.mark.slow
def test_a_subset_of_layers_and_a_smaller_set_later(tmp_path: Path) -> None:
    run = write_tiny_run(tmp_path / "run", layers=(1, 4, 5, 7, 9, 10, 11, 30))
    assert names(draw(run))[2:] == [
        "training_curves_overlaid_layers_1_10.png",
        "training_curves_overlaid_layers_11_30.png",
    ]
    for layer in (11, 30):
        for file in (run / f"layer_{layer}").iterdir():
            file.unlink()
        (run / f"layer_{layer}").rmdir()
    written = draw(run)
    assert set((run / "figures").iterdir()) == set(written)  # the curves of the layers that left are gone too
    assert names(written)[2:] == ["training_curves_overlaid_layers_1_10.png"]


@pytest.mark.slow
def test_drawing_again_gives_the_same_bytes(tmp_path: Path) -> None:
    run = write_tiny_run(tmp_path / "run", layers=range(3))
    before = [path.read_bytes() for path in draw(run)]
    assert [path.read_bytes() for path in draw(run)] == before


def test_comparison_plots_the_held_out_scores_and_the_affine_maps(tmp_path: Path) -> None:
    run = write_tiny_run(tmp_path / "run", layers=range(5))
    evaluation = json.loads((run / "evaluation.json").read_text())["layers"]
    left, right = comparison(Run(run).scores).axes
    plotted = {line.get_label(): line.get_ydata() for line in left.lines}
    fvu = [evaluation[str(layer)]["fvu"] for layer in range(5)]
    affine = np.array([evaluation[str(layer)]["fvu_linear"] for layer in range(5)])
    ordinary = [evaluation[str(layer)]["fvu_ordinary"] for layer in range(5)]
    np.testing.assert_array_equal(plotted["ordinary tokens"], ordinary)
    np.testing.assert_array_equal(plotted["all tokens"], fvu)
    np.testing.assert_array_equal(plotted["best affine map, all tokens"], affine)
    np.testing.assert_allclose(plotted["mean, ordinary tokens"], sum(ordinary) / 5)
    assert left.get_yscale() == "log"
    assert left.get_ylabel() == "Held-out FVU"
    percent = {line.get_label(): line.get_ydata() for line in right.lines}
    np.testing.assert_allclose(percent["ordinary tokens"], 100 - 100 * np.array(ordinary))
    np.testing.assert_allclose(percent["all tokens"], 100 - 100 * np.array(fvu))
    np.testing.assert_allclose(percent["best affine map, all tokens"], 100 - 100 * affine)


def test_an_evaluation_of_an_earlier_version_plots_what_it_has() -> None:
    layers = {layer: LayerScores(fvu=0.1, variance_explained=0.9, fvu_linear=0.3) for layer in range(3)}
    left, _ = comparison(Evaluation(layers=layers)).axes
    assert [line.get_label() for line in left.lines] == [
        "bilinear transcoder",
        "best affine map",
        "mean, bilinear transcoder",
    ]


def derivative_scores(layers: int, worst: dict[int, float] | None = None) -> Evaluation:
    """Cosines that fall by layer, and an interchange whose lowest R² is 0.5 but for `worst`."""
    lowest = dict.fromkeys(range(layers), 0.5) | (worst or {})
    return Evaluation(
        layers={
            layer: LayerScores(
                fvu=0.1,
                variance_explained=0.9,
                jacobian_cosine=1 - layer / layers,
                jacobian_cosine_data=1 - layer / layers / 2,
                interchange={"embedding": 0.9, "mlp 0": lowest[layer]},
                halfway=0.7,
            )
            for layer in range(layers)
        }
    )


@pytest.mark.parametrize(("layers", "worst"), [(6, {1: -1.96}), (24, {}), (30, {11: -40.0}), (1, {})])
def test_derivatives_plots_cosines_and_the_worst_interchange(layers: int, worst: dict[int, float]) -> None:
    with matplotlib.rc_context(fname=figures.STYLE):
        figure = derivatives(derivative_scores(layers, worst))
        figure.draw_without_rendering()
    left, right = figure.axes
    cosines, between = (line.get_ydata() for line in left.lines)
    np.testing.assert_allclose(cosines, 1 - np.arange(layers) / layers)
    np.testing.assert_allclose(between, 1 - np.arange(layers) / layers / 2)
    lowest, halfway, zero = (line.get_ydata() for line in right.lines)
    np.testing.assert_array_equal(lowest, [worst.get(layer, 0.5) for layer in range(layers)])
    assert set(halfway) == {0.7}
    assert set(zero) == {0}
    assert right.get_ylim()[0] < min(lowest)  # nothing is cut off
    for axes, sides in ((left, "x"), (right, "xy")):
        for side in sides:
            assert not overlapping(figure, getattr(axes, f"get_{side}ticklabels")())
    assert not overlapping(figure, [text for legend in figure.legends for text in legend.get_texts()])


def overlapping(figure: Figure, texts: list[Text]) -> list[str]:
    """Neighboring texts, of those that are seen, that touch."""
    boxes = [(t.get_text(), t.get_window_extent()) for t in texts if t.get_text() and t.get_visible()]
    seen = [(text, box) for text, box in boxes if figure.bbox.overlaps(box)]
    return [f"{a} | {b}" for (a, one), (b, other) in pairwise(seen) if one.overlaps(other)]


def test_without_interchanges_the_cosines_stand_alone_and_without_cosines_there_is_no_figure(tmp_path: Path) -> None:
    alone = {0: LayerScores(fvu=0.1, variance_explained=0.9, jacobian_cosine=0.6)}
    assert len(derivatives(Evaluation(layers=alone)).axes) == 1
    run = write_tiny_run(tmp_path / "run", layers=(0,))
    assert "derivatives_by_layer.png" in names(draw(run))
    content = json.loads((run / "evaluation.json").read_text())
    content["layers"]["0"] = {"fvu": 0.1, "variance_explained": 0.9}
    (run / "evaluation.json").write_text(json.dumps(content))
    assert "derivatives_by_layer.png" not in names(draw(run))
    assert not (run / FIGURES / "derivatives_by_layer.png").exists()  # the earlier one says nothing of this run


def test_without_an_evaluation_the_last_training_batches_are_plotted(tmp_path: Path) -> None:
    run = write_tiny_run(tmp_path / "run", steps=80, evaluation=False)
    left, _ = comparison(Run(run).scores).axes
    history = pq.read_table(run / "layer_1" / "history.parquet")["fvu"].to_pylist()
    assert left.lines[0].get_ydata()[1] == pytest.approx(sum(history[30:]) / 50)
    assert left.get_ylabel() == "Training-batch FVU"


def test_training_curves_are_the_running_mean_of_the_history(tmp_path: Path) -> None:
    run = write_tiny_run(tmp_path / "run", layers=(0, 3), steps=400)
    histories = {layer: Run(run).history(layer) for layer in (0, 3)}
    (axes,) = training_curves(histories).axes
    assert axes.get_yscale() == "log"
    for line, history in zip(axes.lines, histories.values(), strict=True):
        expected = [np.mean(history["fvu"][start : start + 4]) for start in range(397)]
        np.testing.assert_allclose(line.get_ydata(), expected)
        np.testing.assert_allclose(line.get_xdata(), np.arange(397) + 2.5)
    assert "running mean over 4 steps" in axes.get_ylabel()
    assert [text.get_text().split(":")[0] for text in axes.texts] == ["layer 0", "layer 3"]


def test_a_fit_of_no_steps_has_no_training_curves(tmp_path: Path) -> None:
    without_curves = ["all_layers_comparison.png", "derivatives_by_layer.png"]
    assert names(draw(write_tiny_run(tmp_path / "run", steps=0))) == without_curves
    run = write_tiny_run(tmp_path / "blind", steps=0, evaluation=False)
    with pytest.raises(UserError, match=r"neither held-out scores nor a training history.*evaluate"):
        draw(run)


def test_curves_differ_without_their_colors() -> None:
    looks = {(str(c["linestyle"]), c["marker"]) for c in CURVES}
    assert len({marker for _, marker in looks}) == len(CURVES) == figures.LAYERS_A_FIGURE
    neighbours = [(c["linestyle"], "markerfacecolor" in c) for c in CURVES]
    assert all(a != b for a, b in pairwise(neighbours))


def test_lines_break_where_layers_are_missing() -> None:
    xs, ys = with_gaps({1: 0.1, 2: 0.2, 5: 0.5})
    assert list(xs) == [1, 2, 3, 4, 5]
    np.testing.assert_array_equal(ys, [0.1, 0.2, np.nan, np.nan, 0.5])


def nearest_apart(positions: list[float], gap: float) -> list[float]:
    """Least squares by brute force: every way to cut the labels into touching groups, each about its mean."""
    best, best_cost = [], np.inf
    n = len(positions)
    for cuts in range(2 ** (n - 1)):
        groups, start = [], 0
        for end in range(1, n + 1):
            if end == n or cuts >> (end - 1) & 1:
                groups.append(range(start, end))
                start = end
        placed = []
        for group in groups:
            middle = np.mean([positions[i] for i in group])
            placed += [middle + gap * (k - (len(group) - 1) / 2) for k in range(len(group))]
        apart = all(b - a >= gap - 1e-12 for a, b in pairwise(placed))
        cost = sum((a - b) ** 2 for a, b in zip(placed, positions, strict=True))
        if apart and cost < best_cost:
            best, best_cost = placed, cost
    return best


def test_labels_move_apart_as_little_as_possible() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        positions = sorted(rng.random(6).tolist())
        np.testing.assert_allclose(spread(positions, 0.12), nearest_apart(positions, 0.12), atol=1e-12)


def test_evaluation_of_other_layers_only_is_not_used(tmp_path: Path) -> None:
    run = write_tiny_run(tmp_path / "run", layers=range(4), steps=3)
    evaluation = json.loads((run / "evaluation.json").read_text())
    full = Run(run).scores
    assert full.held_out
    assert full.values("fvu") == {layer: final_fvu(layer) for layer in range(4)}
    assert full.all_layers == LossScores(**evaluation["all_layers"])
    evaluation["layers"]["7"] = evaluation["layers"]["3"]
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    assert Run(run).scores.all_layers is None  # it is about five layers, and four are here
    del evaluation["layers"]["2"]
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    assert not Run(run).scores.held_out


@pytest.mark.parametrize(
    ("broken", "content", "message"),
    [
        ("layer_1/history.parquet", b"PAR1 no", "not a history"),
        ("evaluation.json", b"{", "not readable JSON"),
        ("recipe.yaml", b"a: [", "not readable as YAML"),
    ],
)
def test_unreadable_files_are_named(tmp_path: Path, broken: str, content: bytes, message: str) -> None:
    run = write_tiny_run(tmp_path / "run", evaluation=broken == "evaluation.json")
    (run / broken).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        draw(run)
    assert str(run / broken) in str(caught.value)


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_tiny_run(tmp_path / "run")
    monkeypatch.setattr("sys.argv", ["figures.py", str(run)])
    command_line(figures.main)
    assert [Path(line) for line in capsys.readouterr().out.split()] == sorted((run / "figures").iterdir())
    monkeypatch.setattr("sys.argv", ["figures.py", str(tmp_path)])
    with pytest.raises(SystemExit) as caught:
        command_line(figures.main)
    assert caught.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "layer_*" in error


def test_a_folder_that_cannot_be_written_ends_in_a_sentence(tmp_path: Path) -> None:
    run = write_tiny_run(tmp_path / "run")
    (run / FIGURES).touch()  # a file in its place
    with pytest.raises(StorageError, match=r"figures cannot be written .*: make room on the disk"):
        draw(run)
    assert sorted(path.name for path in run.glob(".*")) == []
