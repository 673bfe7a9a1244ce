"""The joint finish of a run: the set that it starts from, and what its steps have done to that, held out."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bilinear_tc.modeling_bilinear_tc import BilinearTC
from bilinear_tc.train.base import Base
from bilinear_tc.train.checkpoint import newest_step
from bilinear_tc.train.errors import UserError
from bilinear_tc.train.files import History, sha256_of, written_whole
from bilinear_tc.train.measuring.held_out import shown
from bilinear_tc.train.measuring.replacement import Replacement
from bilinear_tc.train.measuring.tables import Columns, table
from bilinear_tc.train.processes import on_main
from bilinear_tc.train.recipe import FINISH, Recipe
from bilinear_tc.train.run import LAYER_FILES, LAYER_WISE, WEIGHTS, Run
from bilinear_tc.train.shard import Shard
from bilinear_tc.train.start import held_out_fvu, is_compared, put_back, same_text, start_of
from bilinear_tc.train.text.source import open_held_out

# What the finish must have in common with the fit before it.
SHARED = ("base", "base_revision", "mlp_path", "form", "hidden_multiplier", "bias", "init", "max_steps", "bos")
STATES = ("before", "after")  # a set that was put back and is measured on another text has no second one
COLUMNS: Columns = {
    "ce_increase": ("CE increase, all replaced", ".4f"),
    "kl": ("KL, all replaced", ".4f"),
    "mean_fvu": ("mean FVU", ".4f"),
}


def layer_wise(run: Run, recipe: Recipe) -> Recipe:
    """The recipe of the layer-wise fit that comes before a run's joint finish, if that starts from no other run."""
    own = {name: value for name, value in recipe.to_dict().items() if name not in FINISH}
    own |= {"output_dir": str(run.folder / LAYER_WISE), "overwrite": not recipe.resume}
    return Recipe(**own)


def check_source(source: Run, recipe: Recipe) -> None:
    """UserError unless the joint finish of a recipe can start from a run, and leaves it as it is."""
    Run.in_folder(source.folder)
    if source.folder.resolve() == Path(recipe.output_dir or "").resolve():
        raise UserError(f"--from {source.where} is the output_dir too: name another --output_dir")
    whole = source.is_finished and not source.export_problems() and source.recipe.finish == "none"
    if not whole or not (source.recipe.eval_split is None or is_compared(source)):
        raise UserError(
            f"--from {source.where} is no finished run of a layer-wise fit: let train/fit.py end it first, or name "
            "another"
        )
    of_source, of_recipe = source.recipe.to_dict(), recipe.to_dict()
    if recipe.bos == "auto":
        of_recipe["bos"] = of_source["bos"]
    if differing := [f"{n} {of_source[n]}, not {of_recipe[n]}" for n in SHARED if of_source[n] != of_recipe[n]]:
        raise UserError(
            f"--from {source.where} was fitted with {'; '.join(differing)}: leave these settings, and --recipe, out"
        )


def check_same_source(run: Run, recipe: Recipe) -> None:
    """UserError if the run that a begun joint finish is from holds other layers now than it began with."""
    if recipe.from_run is None or not recipe.resume or newest_step(run.folder) is None:
        return
    for begun in sorted(start_of(run).folder.glob(f"layer_*/{WEIGHTS}")):
        now = Path(recipe.from_run, begun.parent.name, WEIGHTS)
        if now.is_file() and sha256_of(now) != sha256_of(begun):
            raise UserError(
                f"{recipe.from_run} holds another {begun.parent.name} now than {run.folder} began with: name another "
                "--output_dir, or --no_resume, with --overwrite if it is finished, to start it anew"
            )


def settled(recipe: Recipe, source: Run) -> Recipe:
    """The recipe with what it leaves to the run that its joint finish starts from."""
    bos = source.recipe.bos if recipe.bos == "auto" else recipe.bos
    tokens = min(source.settings(layer)["fit"]["tokens"] for layer in source.layers)
    steps = recipe.finish_steps or max(1, tokens // (recipe.batch_size * recipe.seq_len))
    return dataclasses.replace(recipe, bos=bos, finish_steps=steps)


def begin_finish(run: Run, source: Run, layers: Sequence[int]) -> None:
    """Copies the layers to where a run's start lies, unless it has gone on from there; UserError if the source lacks
    one."""
    if missing := sorted({*layers} - {*source.layers}):
        raise UserError(
            f"{source.where} holds no layers {', '.join(map(str, missing))}: name those that it holds with --layers"
        )
    start = start_of(run)
    if newest_step(run.folder) is not None and start.is_folder and start.exported_step == 0:
        return
    shutil.rmtree(start.folder, ignore_errors=True)  # of a command that was killed before its first checkpoint
    for layer in layers:
        with written_whole(start.layer_folder(layer)) as scratch:
            for name in LAYER_FILES:
                shutil.copyfile(source.layer_folder(layer) / name, scratch / name)
    start.forget()
    start.note_export(0)


def joint_history(before: Mapping[str, Any], read: int, own: History) -> History:
    """A layer's history over both stages; `read` is the tokens that the first one took."""
    offsets = {"step": len(before["step"]), "tokens": read}
    return {name: [*before[name], *(offsets.get(name, 0) + value for value in own[name])] for name in own}


def measure_finish(run: Run, recipe: Recipe, base: Base, shard: Shard) -> None:
    """Writes what the set measured before and after the joint finish, held out, into each layer's config.yaml.

    The set is put back as a whole if its KL has risen; if only its mean FVU has, that is for the tables to say.
    """
    start, device = start_of(run), base.device
    states = [[of.load(layer).float().to(device) for layer in base.layers] for of in (start, run)]
    fvus = held_out_fvu(states, recipe, base, shard).tolist()
    losses = replaced_losses(states, recipe, base)

    def write() -> None:
        before, after = ({**loss, "mean_fvu": sum(fvu) / len(fvu)} for loss, fvu in zip(losses, fvus, strict=True))
        for layer, *of_layer in zip(base.layers, *fvus, strict=True):
            settings = run.settings(layer)
            joint, gone = settings["joint"], settings["joint"].get("kept") == "start"
            then = joint.get("before", {}).get("mean_fvu")
            pair = [{**of_set, "fvu": fvu} for of_set, fvu in zip((before, after), of_layer, strict=True)]
            back = gone or not after["kl"] <= before["kl"]
            joint |= {"kept": "start" if back else "end", "before": pair[0]}
            if not gone:
                joint["after"] = pair[1]
            elif not same_text(then, before["mean_fvu"]):  # and its end is not there any more
                joint.pop("after", None)
            put_back(run, layer, settings, of_start=back)
        run.forget()
        run.note_export(recipe.finish_steps or 0)

    on_main(write)


@torch.no_grad()
def replaced_losses(sets: Sequence[Sequence[BilinearTC]], recipe: Recipe, base: Base) -> list[dict[str, float]]:
    """`ce_increase` and `kl`, nats a token of the recipe's held-out text, with all layers of each set replaced."""
    replacements = [Replacement(base, transcoders, alone=False) for transcoders in sets]
    count = -(-recipe.eval_tokens // (recipe.batch_size * recipe.seq_len))
    device = base.device
    with open_held_out(recipe, base.tokenizer, device, recipe.batch_size, base.vocabulary) as text:
        for batch in shown(text, count, "all layers replaced, before and after"):
            for replacement in replacements:
                replacement.add(batch)
    scores = [replacement.scores().together for replacement in replacements]
    return [{"ce_increase": score.ce_increase, "kl": score.kl or 0.0} for score in scores]


def finish_table(joint: Mapping[str, Any]) -> str:
    """The table of a set before and after its joint finish, from the `joint` of a layer's config.yaml."""
    rows = {name: joint[name] for name in STATES if name in joint}
    return "\n".join(["joint finish, held out:", table("", COLUMNS, rows), *finish_remarks(joint)])


def finish_remarks(joint: Mapping[str, Any]) -> list[str]:
    """What a reader of the table must know, a sentence each."""
    if joint["kept"] == "start":
        return ["The set is as it was before: the steps ended with a higher KL."]
    worse = joint["after"]["mean_fvu"] > joint["before"]["mean_fvu"]
    return ["Each layer by itself is further from its MLP than before: a higher --anchor holds it there."] * worse
