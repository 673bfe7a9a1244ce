"""Pages and feature files of what a set's layers compute, and of the text that shows it.

python upload/explore.py runs/quickstart --layer 3 --direction "logit: None - self" unit:17 top
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from transformers import HfArgumentParser

from bilinear_tc.train.errors import command_line
from bilinear_tc.train.files import write_json, written_whole
from bilinear_tc.train.processes import start_accelerator
from bilinear_tc.train.recipe import option
from bilinear_tc.train.run import Run
from bilinear_tc.upload.features import features_of
from bilinear_tc.upload.names import recorded_base
from bilinear_tc.upload.pages import PAGES, write_pages
from bilinear_tc.upload.reading import read_set

FEATURES = "features"


@dataclass
class ExploreSettings:
    """What to read, and on what text."""

    layer: str | None = option(None, "A layer's number, or several, such as 0-5,9. Default: all of the set.")
    direction: list[str] = field(
        default_factory=list,
        metadata={
            "action": "extend",
            "help": 'What to read of each layer: "logit: A - B", the logit of the token " A" less that of " B"; '
            '"logit: A"; unit:17; top, the strongest units (top:20: so many). Default: top.',
        },
    )
    tokens: int | None = option(None, "Held-out tokens to look for contexts in. Default: the recipe's eval_tokens.")
    revision: str | None = option(None, "Branch, tag or commit of the repository.")
    base: str | None = option(None, "The base. Default: the recipe's.")
    trust_remote_code: bool = option(False, "Run the code that lies beside the base, as some bases need.")
    dataset: str | None = option(None, "Held-out text. Default: the recipe's dataset.")
    split: str | None = option(None, "Its split. Default: the recipe's eval_split.")
    output: str | None = option(None, "The folder to write. Default: pages, in the run or in the current folder.")


def explore(where: str, settings: ExploreSettings) -> list[Path]:
    """Reads layers of a set, and writes a page for each and a JSON file for each feature; returns the pages."""
    run = Run(where, settings.revision)
    recipe = run.recipe
    held_out = dataclasses.replace(
        recipe,
        base=settings.base or recipe.base,
        base_revision=None if settings.base else recipe.base_revision,
        trust_remote_code=settings.trust_remote_code,  # a set of somebody else's must not say so
        dataset=settings.dataset or recipe.dataset,
        eval_split=settings.split or recipe.eval_split,
        eval_tokens=recipe.eval_tokens if settings.tokens is None else settings.tokens,
        layers=settings.layer,
        dtype="float32",
    )
    read = read_set(run, settings.direction or ["top"], held_out, start_accelerator().device)
    folder = Path(settings.output or (run.folder / PAGES if run.is_folder else PAGES))
    pages = write_pages(read, folder, recorded_base(run), held_out, run.evaluation)
    for of in read.layers:
        with written_whole(folder / FEATURES / f"layer_{of.layer}", replace=True) as scratch:
            for name, content in features_of(of, read.vocabulary, Path(run.where).name):
                write_json(content, scratch / name)
    return pages


def main() -> None:
    parser = HfArgumentParser(cast(Any, ExploreSettings), allow_abbrev=False, description=ExploreSettings.__doc__)
    parser.add_argument("set", metavar="RUN_OR_REPO", help="a run's folder or a Hub repository")
    settings, rest = parser.parse_args_into_dataclasses()
    for page in explore(rest.set, settings):
        print(page)


if __name__ == "__main__":
    command_line(main)
