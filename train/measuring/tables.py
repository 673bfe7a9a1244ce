"""The tables that a fit and an evaluation print."""

from __future__ import annotations

from bilinear_tc.train.measuring.evaluation import Evaluation

Columns = dict[str, tuple[str, str]]  # a score: its heading, its format

FIT_COLUMNS: Columns = {
    "fvu": ("FVU", ".4f"),
    "variance_explained": ("variance explained", ".2%"),
    "fvu_linear": ("FVU of the best affine map", ".4f"),
}
LOSS_COLUMNS: Columns = {
    "ce_increase": ("CE increase", ".4f"),
    "kl": ("KL", ".4f"),
    "loss_recovered": ("loss recovered", ".2%"),
}


def fit_table(evaluation: Evaluation) -> str:
    """The table of what a fit reached."""
    rows = {str(layer): vars(scores) for layer, scores in evaluation.layers.items()}
    rows["mean"] = {score: evaluation.mean(score) for score in FIT_COLUMNS}
    title = f"held-out text: {evaluation.tokens:,} tokens of {evaluation.dataset} ({evaluation.split})"
    return f"{title}\n{table('layer', FIT_COLUMNS, rows)}"


def loss_table(evaluation: Evaluation) -> str:
    """The table of what the base loses with its MLPs replaced."""
    rows = {str(layer): vars(scores) for layer, scores in evaluation.layers.items()}
    rows["all"] = vars(evaluation.all_layers)
    return f"the base's own loss: {evaluation.base_ce:.4f} nats a token\n{table('replaced', LOSS_COLUMNS, rows)}"


def table(first: str, columns: Columns, rows: dict[str, dict[str, float | None]]) -> str:
    """Rows of scores under their headings, aligned to the right; a dash for what was not measured."""
    widths = {score: max(8, len(heading)) for score, (heading, _) in columns.items()}
    lines = ["  ".join([first, *(f"{heading:>{widths[score]}}" for score, (heading, _) in columns.items())])]
    for name, scores in rows.items():
        values = {score: scores[score] for score in columns}
        cells = ["–" if value is None else format(value, columns[score][1]) for score, value in values.items()]
        lines.append(
            "  ".join([f"{name:>{len(first)}}", *(f"{c:>{w}}" for c, w in zip(cells, widths.values(), strict=True))])
        )
    return "\n".join(lines)
