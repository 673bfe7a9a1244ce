"""A finished set that is fitted over: the new one grows beside it, and takes its place once it is whole."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from bilinear_tc.train.recipe import Recipe
from bilinear_tc.train.run import LAYER_WISE, RECIPE, Run

NEXT = ".next"  # a fit beside a finished set
READY = ".ready"  # the same, finished, on its way to the run's own folder


def workplace(run: Run, recipe: Recipe) -> Run:
    """Where a recipe is fitted: in the run's folder, or beside the finished set in there that it is to overwrite."""
    beside = Run(run.folder / NEXT)
    begins = not recipe.resume and run.is_finished
    if not recipe.overwrite or not (begins or (recipe.resume and beside.is_folder)):
        return run
    beside.check_writable()
    return beside


def take_over(folder: Path) -> None:
    """Puts the set that lies whole beside a run's own in its place, if there is one; what a kill cut short goes on."""
    ready = folder / READY
    if not ready.is_dir():
        return
    if (ready / RECIPE).is_file():  # nothing of it has been moved
        for old in (folder, folder / LAYER_WISE):
            Run(old).delete_fit()
        os.replace(ready / RECIPE, folder / RECIPE)
    for path in [path for path in sorted(ready.rglob("*")) if path.is_file()]:
        target = folder / path.relative_to(ready)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, target)
    shutil.rmtree(ready)
