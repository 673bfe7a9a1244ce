"""A run: the folder that a fit writes, whole at any moment, or a Hub repository in the same layout.

This file alone knows what a run's files are called and what they hold. `files.py` writes each whole or not at all.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from huggingface_hub import constants, hf_hub_download, list_repo_files, snapshot_download

from bilinear_tc.configuration_bilinear_tc import BilinearTCConfig
from bilinear_tc.modeling_bilinear_tc import BilinearTC
from bilinear_tc.train.errors import StorageError, UserError, one_line
from bilinear_tc.train.files import (
    HISTORY_COLUMNS,
    PARTIAL,
    WRITE_ERRORS,
    History,
    delete_files,
    read_history,
    read_json,
    read_yaml,
    sha256_of,
    write_history,
    write_json,
    write_yaml,
    written_whole,
)
from bilinear_tc.train.measuring.evaluation import Evaluation, LayerScores, json_problems
from bilinear_tc.train.processes import on_all, on_main
from bilinear_tc.train.recipe import FREE_SETTINGS, PASSING, Recipe, expanded, read_settings

T = TypeVar("T")

PACKAGE = Path(__file__).resolve().parent.parent
CODE_FILES = ("configuration_bilinear_tc.py", "modeling_bilinear_tc.py")
RECIPE, EVALUATION = "recipe.yaml", "evaluation.json"
CONFIG, WEIGHTS, SETTINGS, HISTORY = "config.json", "model.safetensors", "config.yaml", "history.parquet"
LAYER_FILES = (CONFIG, WEIGHTS, SETTINGS, HISTORY)
CHECKPOINTS = "checkpoints"
START, LOGS = "start", "logs"  # among the checkpoints: the layers as the fit began with them; the trackers' files
LAYER_WISE = "layer-wise"  # a run of its own: what the joint finish starts from, if no other run is named for that
EXPORTED = "exported.json"  # the last file of an export: the step that all layers stand at, and a hash of each file
EXPORTED_BEFORE = f"{CHECKPOINTS}/exported"  # what earlier versions left in its place
UNRECORDED = {"max_steps": 0, "jvp": 0.0, "bos": "none"}  # what a recipe.yaml means that does not name them
SETTLED_STEPS = 50  # a training batch's FVU is noisy: a history's final value is the mean over its last steps


class Run:
    """A run's folder, or a Hub repository in the same layout. Each of its files is read at most once.

    Args:
        where: the folder, or the repository's id.
        revision: branch, tag or commit of the repository.
    """

    def __init__(self, where: str | Path, revision: str | None = None) -> None:
        self.where, self.revision = expanded(str(where)), revision
        self.folder = Path(self.where)
        self._kept: dict[str, Any] = {}

    @classmethod
    def in_folder(cls, folder: Path) -> Run:
        """The run in a folder of this machine; UserError if that is not a folder."""
        if not folder.is_dir():
            raise UserError(f"{folder} is not a folder: expected a run, as train/fit.py writes it")
        return cls(folder)

    # Reading

    @property
    def is_folder(self) -> bool:
        return self.folder.is_dir()

    @cached_property
    def layers(self) -> list[int]:
        """The layers that it holds, ascending; UserError if it holds none, or is not there."""
        if self.is_folder:
            names = [path.name for path in self.folder.iterdir() if path.is_dir()]
        else:
            names = sorted({name.split("/")[0] for name in self._remote_files})
        layers = sorted(int(match[1]) for name in names if (match := re.fullmatch(r"layer_(\d+)", name)))
        if not layers:
            raise UserError(f"{self.where} holds no layer_* folder: expected a run, as train/fit.py writes it")
        return layers

    @cached_property
    def recipe_settings(self) -> dict[str, Any]:
        """recipe.yaml's content: all settings, or those that are known of an imported set."""
        path = self._file(RECIPE)
        if path is None:
            raise UserError(f"{RECIPE} is missing in {self.where}: expected a run, as train/fit.py writes it")
        return read_settings(path)

    @cached_property
    def recipe(self) -> Recipe:
        """The recipe that it was fitted with; settings that are not known of an imported set have their defaults."""
        settings: dict[str, Any] = UNRECORDED | self.recipe_settings
        try:
            return Recipe(**settings)
        except UserError as error:
            raise UserError(f"{RECIPE} of {self.where}: {error}") from error

    def config(self, layer: int) -> BilinearTCConfig:
        """A layer's config.json."""
        return self._layer_file(layer, CONFIG, lambda path: BilinearTCConfig.from_dict(read_json(path)))

    def settings(self, layer: int) -> dict[str, Any]:
        """A layer's config.yaml: its fit for a reader."""
        return self._layer_file(layer, SETTINGS, read_yaml, missing={})

    def fitted_steps(self, layer: int) -> int | None:
        """Steps that a layer was fitted for, in all stages; None if its config.yaml does not tell."""
        settings, counts = self.settings(layer), []
        for stage in ["fit"] + ["joint"] * ("joint" in settings):
            of = settings.get(stage, {})
            steps = of.get("steps") if isinstance(of, dict) else of
            if not isinstance(of, dict) or not isinstance(steps, (int, type(None))):
                raise UserError(f"layer_{layer}/{SETTINGS}: {stage} must hold a whole number of steps, got {steps!r}")
            counts.append(steps)
        return None if None in counts else sum(filter(None, counts))

    def history(self, layer: int) -> dict[str, np.ndarray]:
        """A layer's training history by the columns of `HISTORY_COLUMNS`, one row a step; empty after no steps."""
        return self._layer_file(layer, HISTORY, read_history, missing={name: np.empty(0) for name in HISTORY_COLUMNS})

    @cached_property
    def evaluation(self) -> Evaluation | None:
        """The held-out scores, None if nothing was measured; UserError with the first of `evaluation_problems`."""
        for problem in self.evaluation_problems:
            raise UserError(problem)
        return None if self.evaluation_content is None else Evaluation.from_json(self.evaluation_content)

    @cached_property
    def evaluation_problems(self) -> list[str]:
        """All that is wrong with evaluation.json, a sentence each."""
        try:
            content = self.evaluation_content
        except ValueError as error:
            return [f"{self.folder / EVALUATION} is not readable JSON: {one_line(error)}; run train/evaluate.py again"]
        problems = [] if content is None else json_problems(content)
        return [f"{self.folder / EVALUATION}: {problem}; run train/evaluate.py again" for problem in problems]

    @cached_property
    def evaluation_content(self) -> Any:
        """evaluation.json as it stands, None if there is none."""
        path = self._file(EVALUATION)
        return None if path is None else read_json(path)

    @cached_property
    def scores(self) -> Evaluation:
        """The layers' scores from one source: held out if evaluation.json covers every layer, else of the histories."""
        held_out = self.evaluation
        if held_out is None or not set(self.layers) <= set(held_out.layers):
            return Evaluation(
                layers={layer: self.final_scores(layer) for layer in self.layers},
                dataset=self.recipe_settings.get("dataset"),
                split=self.recipe_settings.get("split"),
                held_out=False,
            )
        return held_out.only(self.layers)

    def final_scores(self, layer: int) -> LayerScores:
        """Mean scores over the last steps of a layer's history."""
        history = self.history(layer)
        if not len(history["step"]):
            raise UserError(
                f"layer_{layer} has neither held-out scores nor a training history: run train/evaluate.py first"
            )
        means: Any = {n: float(history[n][-SETTLED_STEPS:].mean()) for n in ("mse", "variance_explained", "fvu")}
        return LayerScores(**means)

    def layer_folder(self, layer: int) -> Path:
        return self.folder / f"layer_{layer}"

    def load(self, layer: int) -> BilinearTC:
        """A layer's transcoder in evaluation mode; UserError unless it is of that layer, whole and finite."""
        try:
            how: dict[str, Any] = {"revision": self.revision or "main", "output_loading_info": True}
            loaded: Any = BilinearTC.from_pretrained(self.where, subfolder=f"layer_{layer}", **how)
        except Exception as error:  # a damaged file can make transformers fail in any way
            raise UserError(f"layer_{layer} of {self.where} does not load: {one_line(error)}") from error
        transcoder, told = loaded
        if transcoder.config.layer_index != layer:
            raise UserError(f"layer_{layer} of {self.where} says that it is layer {transcoder.config.layer_index}")
        wrong = {kind: sorted(map(str, told[kind])) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}
        wrong["values not finite"] = [name for name, t in transcoder.state_dict().items() if not t.isfinite().all()]
        if found := [f"{kind.replace('_', ' ')}: {', '.join(names)}" for kind, names in wrong.items() if names]:
            raise UserError(f"the weights of layer_{layer} of {self.where} cannot be used ({'; '.join(found)})")
        return transcoder.eval()

    @cached_property
    def _remote_files(self) -> set[str]:
        try:
            if constants.HF_HUB_OFFLINE:  # what lies in the cache
                folder = Path(snapshot_download(self.where, revision=self.revision, local_files_only=True))
                return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
            return set(list_repo_files(self.where, revision=self.revision))
        except Exception as error:  # whatever keeps huggingface_hub and its HTTP client from answering
            raise UserError(
                f"no transcoders at {self.where!r}: expected a run's folder or a Hub repository that you can read, got "
                f"{type(error).__name__}"
            ) from error

    def _file(self, name: str) -> Path | None:
        """Where a file of the run lies on this machine; None if the run has none of that name."""
        if self.is_folder:
            return path if (path := self.folder / name).is_file() else None
        if name not in self._remote_files:
            return None
        try:
            return Path(hf_hub_download(self.where, name, revision=self.revision))
        except Exception as error:  # whatever the network or the cache's disk makes huggingface_hub raise
            raise UserError(f"{name} of {self.where} cannot be fetched: {one_line(error)}") from error

    def _layer_file(self, layer: int, name: str, read: Callable[[Path], T], missing: T | None = None) -> T:
        """A layer's file as `read` reads it, or `missing` if there is none; UserError if it is not readable."""
        key = f"layer_{layer}/{name}"
        if key not in self._kept:
            path = self._file(key)
            if path is None and missing is None:
                raise UserError(f"{key} is missing in {self.where}")
            try:
                self._kept[key] = missing if path is None else read(path)
            except UserError:
                raise
            except Exception as error:  # whatever a damaged file makes its reader raise
                raise UserError(f"{path} is not readable: {one_line(error)}") from error
        return self._kept[key]

    # Continuing

    def check_writable(self) -> None:
        """Makes the folder if it is not there, and checks that it can be written; StorageError if it cannot."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.folder).close()
        except OSError as error:
            raise StorageError(
                f"output_dir {self.folder} cannot be written ({error.strerror}): expected a folder with write "
                "permission; name another with --output_dir"
            ) from error

    def continued(self, recipe: Recipe) -> Recipe:
        """The recipe to go on with, or begin: it leaves `bos` and `finish_steps`, where open, to the run. UserError,
        naming the settings that differ, if the run was begun with a recipe of other results."""
        layers, checkpoints = [*self.folder.glob("layer_*")], [*self.folder.glob(f"{CHECKPOINTS}/step_*")]
        if not recipe.resume and self.is_finished and not recipe.overwrite:
            raise UserError(
                f"{self.folder} holds a finished set, which --no_resume would delete: name another --output_dir, or "
                "add --overwrite"
            )
        if not recipe.resume or not (layers or checkpoints) or self._file(RECIPE) is None:
            return recipe
        before = self.recipe.to_dict()
        names = ["bos"] + ["finish_steps"] * (recipe.finish == before["finish"])
        left = {name: before[name] for name in names if getattr(recipe, name) in ("auto", None)}
        recipe = dataclasses.replace(recipe, **left)
        now = {name: value for name, value in recipe.to_dict().items() if name not in FREE_SETTINGS}
        differing = [f"{name} was {before[name]}, is {value}" for name, value in now.items() if before[name] != value]
        if before["finish"] == "none" != recipe.finish:
            raise UserError(f"{self.folder} holds a layer-wise fit: go on from it with --from {self.folder}")
        if differing:
            raise UserError(
                f"{self.folder} holds a run of another recipe ({'; '.join(differing)}): give the same settings to "
                "resume it, another --output_dir, or --no_resume to start it anew"
            )
        if layers and not checkpoints and not self.is_finished:
            raise UserError(
                f"{self.folder} holds layers that are not fitted to the end, and no checkpoint to resume from: name "
                "another --output_dir, or --no_resume to start it anew"
            )
        return recipe

    @property
    def exported_step(self) -> int | None:
        """The step that all layers stand at, or None if some may stand at another, or are not as they were written."""
        path = self._file(EXPORTED)
        return None if path is None or self.export_problems() else read_json(path)["step"]

    def export_problems(self) -> list[str]:
        """What is not as the last export wrote it, a sentence each; nothing of an imported set, which has no record."""
        path = self._file(EXPORTED)
        if path is None:
            begun = any(self.folder.glob(f"{CHECKPOINTS}/step_*.pt")) and self._file(EXPORTED_BEFORE) is None
            return ["the layers were not all written: run the fit's command again, which writes them"] * begun
        remedy = "run the fit's command again, which writes it from the checkpoint"
        try:
            hashes = read_json(path)["sha256"]
            files = {name: self.folder / name for name in hashes}
            changed = [name for name, f in files.items() if not f.is_file() or sha256_of(f) != hashes[name]]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            return [f"{EXPORTED} is not readable ({one_line(error)}): {remedy}"]
        return [f"{file} is missing, or not as it was written: {remedy}" for file in changed]

    @property
    def is_finished(self) -> bool:
        """Whether it holds a set whose every layer was fitted for all the steps of its recipe."""
        try:
            return {self.fitted_steps(layer) for layer in self.layers} == {self.recipe.all_steps}
        except UserError:
            return False

    # Writing

    def begin(self, recipe: Recipe) -> None:
        """Writes the recipe and the code. What a killed process left half written is deleted, and, if the recipe says
        not to resume, so is what was there before; of files, only those that bear names of this package."""
        if not recipe.resume:
            self.delete_fit()
        for place in [self.folder, self.folder / CHECKPOINTS, *self.folder.glob("layer_*")]:
            for partial in place.glob(".*.partial"):
                if PARTIAL.fullmatch(partial.name):
                    shutil.rmtree(partial)
        self.write_root({name: value for name, value in recipe.to_dict().items() if name not in PASSING})

    def delete_fit(self) -> None:
        """Deletes what a fit has written; folders only if nothing else is in them."""
        folders = [path for path in self.folder.glob("layer_*") if re.fullmatch(r"layer_\d+", path.name)]
        files = [self.folder / EXPORTED, self.folder / EVALUATION, *(f / name for f in folders for name in LAYER_FILES)]
        delete_files([*files, *self.folder.glob(f"{CHECKPOINTS}/step_*.pt")])
        for name in (LOGS, START):
            shutil.rmtree(self.folder / CHECKPOINTS / name, ignore_errors=True)
        for folder in [*folders, self.folder / CHECKPOINTS]:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        self.forget()

    def write_root(self, recipe_settings: dict[str, Any]) -> None:
        """Writes the recipe, and the code that makes the layers loadable."""
        with written_whole(self.folder) as scratch:
            write_yaml(recipe_settings, scratch / RECIPE)
            for name in CODE_FILES:
                shutil.copyfile(PACKAGE / name, scratch / name)
        self.forget()

    def write_layers(
        self,
        transcoders: Sequence[BilinearTC],
        histories: Sequence[History],
        settings: Sequence[dict[str, Any]],
        step: int,
    ) -> None:
        """Writes the layers' folders as they are after a step, each process those of its own, and notes when all are
        written; an evaluation of what they held is deleted. StorageError if a file cannot be written, as on a full
        disk; each file in the run is whole."""
        try:
            on_main(lambda: delete_files(self.folder / void for void in (EVALUATION, EXPORTED, EXPORTED_BEFORE)))
            on_all(lambda: list(map(self.write_layer, transcoders, histories, settings)))
            on_main(lambda: self.note_export(step))
        except WRITE_ERRORS as error:
            reason = one_line(error.__cause__ or error)
            raise StorageError(
                f"the layers could not all be written to {self.folder} ({reason}): those that are there "
                "are whole, and so are the checkpoints; make room on the disk and run the same command to resume"
            ) from error

    def note_export(self, step: int) -> None:
        """Writes down that all layers stand at a step, and what their files are."""
        folders = [self.layer_folder(layer) for layer in self.layers]
        hashes = {f"{folder.name}/{name}": sha256_of(folder / name) for folder in folders for name in LAYER_FILES}
        with written_whole(self.folder) as scratch:
            write_json({"step": step, "sha256": hashes}, scratch / EXPORTED)

    def write_layer(self, transcoder: BilinearTC, history: History, settings: dict[str, Any]) -> None:
        """Writes one layer's folder: the model, its settings for a reader, and its history."""
        with written_whole(self.layer_folder(transcoder.config.layer_index)) as scratch:
            save_weights(transcoder, scratch)
            write_yaml(settings, scratch / SETTINGS)
            write_history(history, scratch / HISTORY)
        self.forget()

    def write_evaluation(self, evaluation: Evaluation) -> None:
        with written_whole(self.folder) as scratch:
            write_json(evaluation.to_json(), scratch / EVALUATION)
        self.forget()

    def forget(self) -> None:
        """What was read may have been overwritten."""
        self.__dict__ = vars(Run(self.where, self.revision))


def save_weights(transcoder: BilinearTC, folder: Path) -> None:
    """Writes config.json and model.safetensors, without the code: it lies once, at the run's root."""
    vars(transcoder)["should_save_on_this_rank"] = lambda _: True  # for transformers, only the first process writes
    transcoder.save_pretrained(folder, max_shard_size="10000GB")  # in one file
    for name in CODE_FILES:
        (folder / name).unlink(missing_ok=True)
