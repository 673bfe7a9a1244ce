"""Held-out measures of a run or a published set: FVU of every layer, and the base's loss with its MLPs replaced.

    accelerate launch train/evaluate.py --transcoders runs/quickstart

What is left out of the command line is read from the set's recipe.yaml.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

from bilinear_tc.train.base import Base
from bilinear_tc.train.errors import UserError, command_line
from bilinear_tc.train.measuring.ceiling import with_ceiling
from bilinear_tc.train.measuring.held_out import measure_held_out
from bilinear_tc.train.measuring.tables import fit_table, loss_table
from bilinear_tc.train.processes import on_main, process_count, start_accelerator
from bilinear_tc.train.recipe import option, parse_settings
from bilinear_tc.train.run import EVALUATION, Run
from bilinear_tc.train.shard import Shard
from bilinear_tc.train.text.source import check_text


@dataclass
class EvaluationSettings:
    """What to measure, and on what text."""

    transcoders: str = field(metadata={"help": "A run's folder or a Hub repository."})
    revision: str | None = option(None, "Branch, tag or commit of the repository.")
    base: str | None = option(None, "The base. Default: the recipe's.")
    base_revision: str | None = option(None, "The base's branch, tag or commit.")
    trust_remote_code: bool = option(False, "Run the code that lies beside the base, as some bases need.")
    dataset: str | None = option(None, "Held-out text. Default: the recipe's dataset.")
    dataset_config: str | None = option(None, "The dataset's configuration name.")
    split: str | None = option(None, "Its split. Default: the recipe's eval_split.")
    text_column: str | None = option(None, "The column that holds the text.")
    skip_bad_rows: bool = option(False, "Leave out rows that hold no text or cannot be read.")
    tokens: int | None = option(None, "Tokens to measure the layers on. Default: the recipe's eval_tokens.")
    loss_tokens: int | None = option(
        None,
        "Tokens to measure the base's loss on, at the cost of a pass of the base a layer; 0: not at all. Default: as "
        "--tokens.",
    )
    batch_size: int = option(16, "Sequences at once, over all processes.")
    dtype: Literal["float32", "bfloat16"] = option("float32", "Compute type.")
    ceiling: bool = option(
        False,
        "Fit the set's recipe once more, to the MLPs' derivative alone, to say what Jacobian cosine can be reached. "
        "That takes as long as the fit did.",
    )
    output: str | None = option(
        None, "The folder for evaluation.json. Default: the run, or for a repository the current folder."
    )


def evaluate(settings: EvaluationSettings) -> None:
    """Measures a set, prints its tables and writes evaluation.json."""
    device = start_accelerator().device
    run = Run(settings.transcoders, settings.revision)
    recipe = dataclasses.replace(
        run.recipe,
        base=settings.base or run.recipe.base,
        base_revision=settings.base_revision or run.recipe.base_revision,
        trust_remote_code=settings.trust_remote_code,  # a set of somebody else's must not say so
        dtype=settings.dtype,
    )
    held_out = dataclasses.replace(
        recipe,
        dataset=settings.dataset or recipe.dataset,
        dataset_config=settings.dataset_config or recipe.dataset_config,
        eval_split=settings.split or recipe.eval_split,
        text_column=settings.text_column or recipe.text_column,
        skip_bad_rows=settings.skip_bad_rows or recipe.skip_bad_rows,
        eval_tokens=settings.tokens or recipe.eval_tokens,
    )
    loss_tokens = held_out.eval_tokens if settings.loss_tokens is None else settings.loss_tokens
    if loss_tokens < 0:
        raise UserError(f"loss_tokens must be at least 0, got {loss_tokens}")
    on_main(lambda: check_text(recipe, held_out))
    base = Base.of_recipe(recipe, device, run.layers)
    shard = Shard(len(base.layers), shared_out=process_count() <= len(base.layers))
    held = base.layers if loss_tokens else shard.of(base).layers  # the base needs all, if it is to run with all
    transcoders = [run.load(layer).float().to(device) for layer in held]
    evaluation = measure_held_out(
        *(transcoders, recipe, base),
        held_out=held_out,
        batch_size=settings.batch_size,
        loss_tokens=loss_tokens,
        shard=shard,
    )
    target = Run(settings.output or (settings.transcoders if run.is_folder else "."))
    on_main(lambda: target.write_evaluation(evaluation))
    if settings.ceiling:
        evaluation = with_ceiling(evaluation, recipe, base, held_out, settings.batch_size)
        on_main(lambda: target.write_evaluation(evaluation))
    tables = [fit_table(evaluation), *([loss_table(evaluation)] if loss_tokens else [])]
    on_main(lambda: print(*tables, f"wrote {target.folder / EVALUATION}", sep="\n\n"))


def main() -> None:
    evaluate(parse_settings(EvaluationSettings))


if __name__ == "__main__":
    command_line(main)
