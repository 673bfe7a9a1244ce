"""Runs the fit in processes that are forked with everything imported already, on a tiny base and local text.

A fresh interpreter spends seconds importing torch and transformers; a fork of one that has done so spends none, and is
a process of its own all the same: it can be killed, and it ends with an exit status and what it printed. Run as a
script, this file is the process that the others are forked from.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow
import pyarrow.parquet
import yaml

QUICKSTART = Path(__file__).resolve().parent.parent / "train" / "quickstart"
DEADLINE = 240.0  # seconds that no process of these tests comes near on an idle machine


@dataclass
class Finished:
    """How a process ended, a killed one with minus the signal's number, and what it printed."""

    returncode: int
    stdout: str
    stderr: str

    @property
    def errors(self) -> list[str]:
        """The sentences with which the script ended."""
        return [line for line in self.stderr.replace("\r", "\n").splitlines() if line.startswith("error")]


@dataclass
class Fit:
    """A fit under way in a forked process."""

    pid: int
    output: Path
    server: ForkServer

    @property
    def stderr(self) -> str:
        """What it has printed there so far."""
        return self.output.with_suffix(".err").read_text()

    def wait(self) -> Finished:
        timer = threading.Timer(DEADLINE, self.kill)
        timer.start()
        try:
            returncode = self.server.ask({"wait": self.pid})
        finally:
            timer.cancel()
        return Finished(returncode, *(self.output.with_suffix(end).read_text() for end in (".out", ".err")))

    def kill(self, number: int = signal.SIGKILL) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)


class ForkServer:
    """Starts fits by forking.

    Args:
        folder: where the processes' output is kept.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._count = 0
        self._lock = threading.Lock()
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        )

    def ask(self, request: dict) -> int:
        with self._lock:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            return int(self._process.stdout.readline())

    def start(
        self, flags: Sequence[object], *, sabotage: Sequence[object] = (), environment: dict[str, str] | None = None
    ) -> Fit:
        """Starts `train/fit.py FLAGS`.

        Args:
            flags: the command line.
            sabotage: a function of `sabotage.py`, by name, and its arguments, called before the fit.
            environment: variables to set.
        """
        self._count += 1
        output = self.folder / f"fit-{self._count}"
        for end in (".out", ".err"):
            output.with_suffix(end).touch()
        request = {"flags": list(map(str, flags)), "output": str(output), "sabotage": list(map(str, sabotage))}
        return Fit(self.ask(request | {"environment": environment or {}}), output, self)

    def run(self, flags: Sequence[object], **settings: object) -> Finished:
        return self.start(flags, **settings).wait()

    def start_processes(self, count: int, flags: Sequence[object], **settings: object) -> list[Fit]:
        """Starts one fit of several processes, which know each other as `torchrun` would tell them."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        shared = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        return [
            self.start(
                flags,
                environment={name: str(v) for name, v in {**shared, "RANK": rank, "LOCAL_RANK": rank}.items()},
                **settings,
            )
            for rank in range(count)
        ]

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


@dataclass
class TinyFit:
    """A fit of a tiny base on local text.

    Attributes:
        base: two layers of width 16, as `write_base` makes them.
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

    def run(self, run: Path, *more: object, **settings: object) -> Finished:
        return self.server.run(self.flags(run, *more), **settings)

    def start(self, run: Path, *more: object, **settings: object) -> Fit:
        return self.server.start(self.flags(run, *more), **settings)

    def reference(self, *more: object) -> Path:
        """The run of a fit with these settings that nothing befell; made once."""
        key = tuple(map(str, more))
        if key not in self._references:
            run = self.folder / f"reference-{len(self._references)}"
            finished = self.run(run, *more)
            assert finished.returncode == 0, finished.stderr
            self._references[key] = run
        return self._references[key]


def serve() -> None:
    """Forks a process for every request to start one, and waits for one on request."""
    from bilinear_tc.train import fit  # noqa: F401  (imported once, here, for all of them)
    from bilinear_tc.train.base import Base

    Base.load(str(QUICKSTART))  # which imports what transformers leaves for later
    requests, replies = sys.stdin, os.fdopen(os.dup(1), "w")
    for line in iter(requests.readline, ""):
        request = json.loads(line)
        if "wait" in request:
            reply = os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])
        else:
            reply = os.fork()
            if not reply:
                return begin(request)
        print(reply, file=replies, flush=True)


def begin(request: dict) -> None:
    """A forked process's life: the fit, with its output in files."""
    import sabotage

    from bilinear_tc.train import fit
    from bilinear_tc.train.command import command_line

    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for descriptor, end in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(request["output"] + end, os.O_WRONLY), descriptor)
    os.environ.update(request["environment"])
    if hasattr(os, "sched_setaffinity"):  # one thread: more would only wait for each other on layers this small
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[os.getpid() % len(cores)]})
    if request["sabotage"]:
        name, *arguments = request["sabotage"]
        getattr(sabotage, name)(*arguments)
    sys.argv = ["train/fit.py", *request["flags"]]
    command_line(fit.main)


def write_base(folder: Path) -> Path:
    """A GPT-NeoX of two layers and width 16 with random weights, and the quickstart base's tokenizer."""
    import torch
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(0)
    vocabulary = json.loads((QUICKSTART / "config.json").read_text())["vocab_size"]
    config = GPTNeoXConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        initializer_range=0.25,
    )
    GPTNeoXForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(QUICKSTART / name, folder / name)
    return folder


def write_text(folder: Path, shards: int = 6, characters: int = 60_000) -> list[Path]:
    """Shards of jsonl, a document a line, from Python's own standard library."""
    from bilinear_tc.train.text.documents import Documents

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


def wait_until(condition: Callable[[], object], seconds: float = DEADLINE) -> None:
    """Returns when the condition holds, and raises TimeoutError if it does not come to."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("the condition has not come true")
        time.sleep(0.002)


def checkpoints(run: Path) -> list[int]:
    """The steps of a run's checkpoints, ascending."""
    return sorted(int(path.stem.removeprefix("step_")) for path in (run / "checkpoints").glob("step_*"))


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
    import torch

    from bilinear_tc.modeling_bilinear_tc import BilinearTC

    folders = sorted(run.glob("layer_*"))
    assert folders
    for folder in folders:
        transcoder = BilinearTC.from_pretrained(folder)
        assert transcoder(torch.randn(3, transcoder.config.n_inputs)).isfinite().all()


if __name__ == "__main__":
    serve()
