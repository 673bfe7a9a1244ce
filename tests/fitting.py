"""A fit of a tiny base on local text that takes seconds, and what is said of the run that it leaves."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow
import pyarrow.parquet
import torch
import yaml
from forking import Finished, ForkServer, Process

from bilinear_tc.modeling_bilinear_tc import BilinearTC
from bilinear_tc.train import fit
from bilinear_tc.train.text.documents import Documents


@dataclass
class TinyFit:
    """A fit of a tiny base on local text.

    Attributes:
        base: two layers of width 16, as `bases.write_base` makes them.
        text: a folder of shards, as `write_text` makes them.
        folder: where runs may go.
    """

    server: ForkServer
    base: Path
    text: Path
    folder: Path

    def __post_init__(self) -> None:
        self._references: dict[tuple[str, ...], Path] = {}
        settings = {
            "base": str(self.base),
            "dataset": str(self.text / "*.jsonl"),
            "eval_split": None,
            "seq_len": 32,
            "batch_size": 22,
            "max_steps": 24,
            "init_tokens": 2048,
            "lr": 0.02,
            "shuffle_buffer": 100,
            "checkpoint_every": 4,
            "tokenizer_workers": 0,
        }
        (self.folder / "tiny.yaml").write_text(yaml.safe_dump(settings))

    def flags(self, run: Path, *more: object) -> list[str]:
        """The command line of a fit of 24 steps of 22 × 32 tokens; `more` outranks what is in its recipe."""
        return ["--recipe", str(self.folder / "tiny.yaml"), "--output_dir", str(run), *map(str, more)]

    def run(self, run: Path, *more: object, sabotage: Sequence[object] = ()) -> Finished:
        return self.start(run, *more, sabotage=sabotage).wait()

    def start(self, run: Path, *more: object, sabotage: Sequence[object] = ()) -> Process:
        return self.server.start(fit.main, self.flags(run, *more), sabotage=sabotage)

    def start_processes(self, count: int, run: Path, *more: object, sabotage: Sequence[object] = ()) -> list[Process]:
        """The same in several processes, which know each other."""
        return self.server.start_processes(count, fit.main, self.flags(run, *more), sabotage=sabotage)

    def reference(self, *more: object) -> Path:
        """The run of a fit with these settings that nothing befell; made once."""
        key = tuple(map(str, more))
        if key not in self._references:
            run = self.folder / f"reference-{len(self._references)}"
            finished = self.run(run, *more)
            assert finished.returncode == 0, finished.stderr
            self._references[key] = run
        return self._references[key]


def write_text(folder: Path, shards: int = 6, characters: int = 60_000) -> list[Path]:
    """Shards of jsonl, a document a line, from Python's own standard library."""
    folder.mkdir(parents=True)
    documents = iter(Documents("python-stdlib"))
    return [_write_shard(folder / f"shard-{number}.jsonl", documents, characters) for number in range(shards)]


def _write_shard(path: Path, documents: Iterator[str], characters: int) -> Path:
    lines, length = [], 0
    while length < characters:
        text = next(documents)[:5000]
        length += len(text)
        lines.append(json.dumps({"text": text}))
    path.write_text("\n".join(lines) + "\n")
    return path


def checkpoints(run: Path) -> list[int]:
    """The steps of a run's checkpoints, ascending."""
    return sorted(int(path.stem.removeprefix("step_")) for path in (run / "checkpoints").glob("step_????????.pt"))


def partial(run: Path) -> list[str]:
    """What lies half written in a run."""
    return sorted(str(path.relative_to(run)) for path in run.rglob(".*.partial"))


def layers(run: Path) -> dict[str, tuple[bytes, pyarrow.Table]]:
    """Each layer's weights and history."""
    return {
        folder.name: (
            (folder / "model.safetensors").read_bytes(),
            pyarrow.parquet.read_table(folder / "history.parquet"),
        )
        for folder in sorted(run.glob("layer_*"))
    }


def assert_same_layers(run: Path, reference: Path) -> None:
    """The weights and histories of two runs are the same to the bit."""
    ours, theirs = layers(run), layers(reference)
    assert ours.keys() == theirs.keys()
    for name, (weights, history) in ours.items():
        assert weights == theirs[name][0], f"the weights of {name} differ"
        assert history.equals(theirs[name][1]), f"the history of {name} differs"


def assert_loads(run: Path) -> None:
    """Every layer of the run loads, and says something finite."""
    folders = sorted(run.glob("layer_*"))
    assert folders
    for folder in folders:
        transcoder = BilinearTC.from_pretrained(folder)
        assert transcoder(torch.randn(3, transcoder.config.n_inputs)).isfinite().all()
