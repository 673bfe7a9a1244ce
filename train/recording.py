"""MLP inputs and outputs on disk: written once by train/cache.py, read by fits in place of passes over the base.

A folder holds `manifest.json`, which says what they were made from, and a safetensors file for each batch and process.
A sequence is found by its tokens, so that neither the order of reading nor the number of processes matters.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bilinear_tc.train.base import Base, Visit
from bilinear_tc.train.errors import StorageError, UserError, one_line
from bilinear_tc.train.files import PARTIAL, free_disk, read_json, write_json, written_whole
from bilinear_tc.train.processes import process_count, process_index
from bilinear_tc.train.recipe import Recipe
from bilinear_tc.train.text.batches import TokenBatch

MANIFEST = "manifest.json"
FIT, HELD_OUT = "fit", "held_out"
# what activations depend on, and which sequences there are, beside the layers
MADE_FROM = (
    *("base", "base_revision", "base_quantization", "mlp_path", "dataset", "dataset_config", "split", "text_column"),
    *("skip_bad_rows", "seq_len", "batch_size", "pack", "bos", "shuffle_buffer", "seed"),
)
SAME = 0.02  # how far the base's activations may be from recorded ones, as a share of these: rounding


class Recording:
    """The activations of some layers on a recipe's text.

    Args:
        recipe: its `activations` names the folder; its `bos` is settled.
        base: the base, with the layers to write or to read.
    """

    def __init__(self, recipe: Recipe, base: Base) -> None:
        assert recipe.activations is not None
        self.folder, self.recipe, self.base = Path(recipe.activations), recipe, base
        self.dtype = base.model.dtype
        facts = {name: getattr(recipe, name) for name in MADE_FROM}
        self.made_from = facts | {"eval_split": recipe.eval_split, "dtype": str(self.dtype)[6:], "commit": base.commit}

    @property
    def needed(self) -> dict[str, int]:
        """Batches of each text that the recipe's fit reads; texts that it does not read are not among them."""
        recipe, step = self.recipe, self.recipe.batch_size * self.recipe.seq_len
        measured = recipe.eval_split is not None
        start = -(-recipe.init_tokens // step)  # the closed form's, and the affine maps' that a measured set is held to
        steps = recipe.max_steps + start * (recipe.init == "mlp")
        held_out = -(-recipe.eval_tokens // step) if measured else 0
        counts = {FIT: max(steps, start * measured), HELD_OUT: held_out}
        return {text: count for text, count in counts.items() if count}

    @property
    def bytes_needed(self) -> int:
        """Of all batches together, over all processes."""
        ends = self.base.n_inputs + self.base.n_outputs
        rows = sum(self.needed.values()) * self.recipe.batch_size * self.recipe.seq_len
        return rows * len(self.base.layers) * ends * self.dtype.itemsize

    # Writing

    def begin(self) -> None:
        """Makes ready to write beside what is there; UserError if that is of something else, or the disk too small."""
        for partial in self.folder.glob(".*.partial"):
            if PARTIAL.fullmatch(partial.name):  # of a process that was killed
                shutil.rmtree(partial)
        if (self.folder / MANIFEST).is_file():
            self.check_manifest(exactly=True)
        there = sum(path.stat().st_size for path in self.folder.glob("*.safetensors"))
        missing, free = max(0, self.bytes_needed - there), free_disk(self.folder)
        if missing > free:
            raise StorageError(
                f"{self.folder} needs {missing / 1e9:.2f} GB more, but its disk has {free / 1e9:.2f} GB free: name "
                "another --activations, fewer --layers or fewer --max_steps"
            )
        if not (self.folder / MANIFEST).is_file():
            self.note({})

    def note(self, batches: dict[str, int]) -> None:
        """Writes down what there is: so many batches of each text, which a held-out text may end before."""
        batches = {FIT: 0, HELD_OUT: 0} | batches
        made_from = {"made_from": self.made_from, "sha256": digest_of(self.made_from)}
        if (self.folder / MANIFEST).is_file():
            before = self.check_manifest(exactly=True)
            batches = {text: max(count, before[text]) for text, count in batches.items()}
        with written_whole(self.folder) as scratch:
            write_json(made_from | {"layers": self.base.layers, "batches": batches}, scratch / MANIFEST)

    def path(self, text: str, number: int) -> Path:
        """Where this process's share of a batch lies."""
        return self.folder / f"{text}-{number:06d}-{process_index()}of{process_count()}.safetensors"

    def write(self, text: str, number: int, batch: TokenBatch, micro_batch_size: int) -> None:
        """Runs the base on this process's share of a batch, as a fit would, and writes what its MLPs saw and said."""
        parts: dict[str, list[Tensor]] = {}

        def visit(layer: int, x: Tensor, y: Tensor) -> None:
            for side, values in (("x", x), ("y", y)):
                parts.setdefault(f"{side}.{layer}", []).append(values.to("cpu", copy=True))

        if not len(batch):  # of few sequences, not every process has one
            return
        for ids in batch.input_ids.split(micro_batch_size):
            self.base.run(ids, visit)
        first = number * self.recipe.batch_size + process_index() * self.recipe.batch_size // process_count()
        tensors = {name: torch.cat(of_name) for name, of_name in parts.items()}
        tensors["sequences"] = torch.arange(first, first + len(batch))  # their places in the text, as it is drawn
        tensors["input_ids"] = batch.input_ids.int().cpu()
        path = self.path(text, number)
        with written_whole(self.folder) as scratch:
            save_file(tensors, scratch / path.name)

    # Reading

    def check(self) -> None:
        """UserError if a fit of the recipe cannot read it: it is of something else, or not whole."""
        if not (self.folder / MANIFEST).is_file():
            raise UserError(f"{self.folder} holds no activations: expected a folder that train/cache.py has written")
        there = self.check_manifest()
        for text, count in self.needed.items():
            if there[text] < count:
                raise UserError(
                    f"{self.folder} holds {there[text]} of the {count} batches of the {text.replace('_', '-')} text: "
                    "run train/cache.py with the fit's settings, which writes those that are missing"
                )
        self.check_base()

    def check_manifest(self, exactly: bool = False) -> dict[str, int]:
        """The batches of each text; UserError if the activations were made from something else than the recipe names.

        `exactly`: of the same layers, and the same held-out text even if there is none.
        """
        try:
            manifest = read_json(self.folder / MANIFEST)
            before, layers, batches = manifest["made_from"], manifest["layers"], manifest["batches"]
            if digest_of(before) != manifest["sha256"]:
                raise ValueError("its hash is of something else")
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.folder / MANIFEST} is not readable ({one_line(error)}): write it anew") from error
        free = {"eval_split"} if self.recipe.eval_split is None and not exactly else set()
        now = {name: value for name, value in self.made_from.items() if name not in free}
        differing = [
            f"{name} was {before.get(name)}, is {value}" for name, value in now.items() if before.get(name) != value
        ]
        lacking = sorted({*self.base.layers} - {*layers})
        if lacking or (exactly and layers != self.base.layers):
            differing.append(f"layers were {layers}, are {self.base.layers}")
        if differing:
            raise UserError(
                f"{self.folder} holds activations of something else ({'; '.join(differing)}): give the same settings, "
                "or another --activations"
            )
        return batches

    @torch.no_grad()
    def check_base(self) -> None:
        """UserError if the base does not say what is recorded, on one sequence: its weights may have changed since."""
        path = next(self.folder.glob("*.safetensors"), None)
        if path is None:
            raise UserError(f"{self.folder} holds a {MANIFEST} alone: expected activations beside it; write it anew")
        with opened(path) as file:
            ids = file.get_slice("input_ids")[:1].long().to(self.base.device)
        recorded: dict[int, Tensor] = {}
        self.replay(ids, lambda layer, _x, y: recorded.update({layer: y}))
        for layer, (_, true) in self.base.activations(ids).items():
            there = recorded[layer].float()
            if not (true.float() - there).norm() <= SAME * there.norm():
                raise UserError(
                    f"{self.folder} holds other outputs of layer {layer}'s MLP than the base {self.recipe.base} gives: "
                    "expected those of the same weights; write it anew"
                )

    def replay(self, input_ids: Tensor, visit: Visit) -> None:
        """Tells what a pass of the base would, as `Base.run` does; UserError if a sequence was not recorded."""
        try:
            places = [self._places[digest] for digest in digests(input_ids)]
        except KeyError as error:
            raise UserError(
                f"{self.folder} lacks a sequence of the text: expected the text that it was made from; has that "
                "changed? Write it anew"
            ) from error
        for layer in self.base.layers:
            sides = (self._read(f"{side}.{layer}", places).to(input_ids.device) for side in ("x", "y"))
            visit(layer, *sides)

    @cached_property
    def _places(self) -> dict[bytes, tuple[Path, int]]:
        """The file and the place in it of each sequence."""
        places: dict[bytes, tuple[Path, int]] = {}
        for path in sorted(self.folder.glob("*.safetensors")):
            with opened(path) as file:
                places |= {digest: (path, row) for row, digest in enumerate(digests(file.get_tensor("input_ids")))}
        return places

    def _read(self, name: str, places: Sequence[tuple[Path, int]]) -> Tensor:
        """Rows of a tensor, from wherever they are: what lies together is read at once."""
        runs: list[tuple[Path, int, int]] = []
        for path, row in places:
            if runs and runs[-1][0] == path and runs[-1][2] == row:
                runs[-1] = (path, runs[-1][1], row + 1)
            else:
                runs.append((path, row, row + 1))
        parts = []
        for path, start, end in runs:
            with opened(path) as file:
                parts.append(file.get_slice(name)[start:end])
        return torch.cat(parts)


def digests(input_ids: Tensor) -> list[bytes]:
    """A short name for each sequence [sequences, tokens] that no other one has."""
    rows = input_ids.int().cpu().numpy()
    return [hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in rows]


def digest_of(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A safetensors file, mapped into memory; UserError if it is damaged."""
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path} cannot be read ({one_line(error)}): delete it, and run train/cache.py again"
        ) from error
