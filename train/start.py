"""The set as its fit began with it: kept beside the checkpoints, so that no layer ends worse than it began."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bilinear_tc.modeling_bilinear_tc import BilinearTC
from bilinear_tc.train.activations import Activations
from bilinear_tc.train.base import Base
from bilinear_tc.train.files import write_yaml, written_whole
from bilinear_tc.train.measuring.held_out import MICRO_BATCH_SIZE, shown
from bilinear_tc.train.moments import Moments, fvu
from bilinear_tc.train.processes import on_main, sum_over_processes
from bilinear_tc.train.recipe import Recipe
from bilinear_tc.train.run import CHECKPOINTS, CONFIG, SETTINGS, START, WEIGHTS, Run
from bilinear_tc.train.shard import Shard
from bilinear_tc.train.text.source import open_held_out


def start_of(run: Run) -> Run:
    """Where the layers lie as a run's fit began with them."""
    return Run(run.folder / CHECKPOINTS / START)


def is_compared(run: Run) -> bool:
    """Whether every layer of a fitted run has been compared with its stage's start, as far as that is there."""
    start, settings = start_of(run), map(run.settings, run.layers)
    begun = start.is_folder and start.exported_step == 0
    return all("before" in of["joint"] if "joint" in of else "kept" in of["fit"] or not begun for of in settings)


def keep_the_better(run: Run, recipe: Recipe, base: Base, shard: Shard) -> None:
    """Puts back every layer of a fitted run that has a higher held-out FVU than it began with; each layer's config.yaml
    says which state it is in (`kept`), and what both score (`fvu_start`, `fvu_end`).

    Nothing if the start is not there: the fit began with noise, made no step, or its checkpoints were deleted.
    """
    start = start_of(run)
    if on_main(lambda: start.exported_step if start.is_folder else None) != 0:
        return
    own, device = shard.of(base).layers, base.device
    states = [[of.load(layer).float().to(device) for layer in own] for of in (start, run)]
    before, after = held_out_fvu(states, recipe, base, shard).tolist()

    def keep() -> None:
        for layer, fvu_start, fvu_end in zip(base.layers, before, after, strict=True):
            settings = run.settings(layer)
            fit = settings["fit"]
            if fit.get("kept") != "start":
                fit |= {"kept": "start" if fvu_start < fvu_end else "end", "fvu_end": fvu_end}
            elif not same_text(fit.get("fvu_start"), fvu_start):  # and its end is not there any more
                fit.pop("fvu_end", None)
            fit["fvu_start"] = fvu_start
            put_back(run, layer, settings, of_start=fvu_start < fvu_end)
        run.forget()
        run.note_export(recipe.max_steps)

    on_main(keep)


def same_text(then: float | None, now: float) -> bool:
    """Whether two measures of one state are of one text: rounding and the number of processes change less of them."""
    return then is not None and math.isclose(then, now, rel_tol=1e-5)


def put_back(run: Run, layer: int, settings: dict[str, Any], *, of_start: bool) -> None:
    """Writes what a layer's config.yaml holds now, and the layer itself as its stage began with it, if that is kept."""
    with written_whole(run.layer_folder(layer)) as scratch:
        for name in (CONFIG, WEIGHTS) if of_start else ():
            shutil.copyfile(start_of(run).layer_folder(layer) / name, scratch / name)
        write_yaml(settings, scratch / SETTINGS)


@torch.no_grad()
def held_out_fvu(sets: Sequence[Sequence[BilinearTC]], recipe: Recipe, base: Base, shard: Shard) -> Tensor:
    """FVU [sets, layers] of several sets on the recipe's held-out text, in one pass of the base, given the transcoders
    of this process's layers."""
    device, rows = base.device, shard.sequences(recipe.batch_size) * recipe.seq_len
    activations = Activations(base, rows, device=device, dtype=base.model.dtype, shard=shard)
    shape = (len(shard.own), base.n_outputs)
    errors = torch.zeros(len(sets), *shape, dtype=torch.float64, device=device)
    outputs = Moments.zeros(*shape, device=device)
    count = -(-recipe.eval_tokens // (recipe.batch_size * recipe.seq_len))
    with open_held_out(recipe, base.tokenizer, device, recipe.batch_size, base.vocabulary) as text:
        for batch in shown(text, count, "held-out text, start and end"):
            activations.fill(batch, MICRO_BATCH_SIZE)
            with shard.alone():
                outputs = outputs.merge(activations.moments()[1].over_processes())
            for of_set, transcoders in zip(errors, sets, strict=True):
                for layer, transcoder in enumerate(transcoders):
                    error = activations.y[layer].float() - transcoder(activations.x[layer].float())
                    of_set[layer] += error.square().sum(0, dtype=torch.float64)
    with shard.alone():
        own = fvu(sum_over_processes(errors), outputs)
    return shard.gather(own.T).T
