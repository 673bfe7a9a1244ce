"""Layers shared out over processes are fitted, saved and measured like layers that every process holds."""

from __future__ import annotations

import json
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
import yaml
from bases import tiny_neox
from fitting import TinyFit, assert_loads, assert_same_layers, checkpoints, partial, write_text
from forking import Finished, ForkServer, wait_until
from test_processes import LOST, assert_close_layers
from transformers import GPTNeoXForCausalLM

from bilinear_tc.train import evaluate
from bilinear_tc.train.activations import Activations
from bilinear_tc.train.base import Base
from bilinear_tc.train.errors import UserError
from bilinear_tc.train.fitting import fitter
from bilinear_tc.train.processes import process_count, process_index, start_accelerator
from bilinear_tc.train.recipe import Recipe
from bilinear_tc.train.shard import Shard
from bilinear_tc.train.text.batches import TokenBatch

CPU = torch.device("cpu")


def hand_over_rows() -> None:
    """A script: each process's rows of a batch, shared out, against those of a base that sees the whole batch. The
    arguments are the number of sequences and a type."""
    start_accelerator()
    sequences, dtype = int(sys.argv[1]), getattr(torch, sys.argv[2])
    base = Base(tiny_neox(num_hidden_layers=5).to(dtype), tokenizer=None)
    ids = torch.randint(50, (sequences, 6), generator=torch.Generator().manual_seed(0))
    start, end = (rank * sequences // process_count() for rank in (process_index(), process_index() + 1))
    shard = Shard(5, shared_out=True)
    kept = slice(shard.own.start, shard.own.stop)
    for mask in (None, torch.arange(6) < torch.tensor([6, 1, 4, 5, 2, 3, 6])[:sequences, None]):
        whole, own = (Activations(base, sequences * 6, device=CPU, dtype=dtype, shard=of) for of in (Shard(5), shard))
        whole.fill(TokenBatch(ids, mask), 100)
        own.fill(TokenBatch(ids[start:end], None if mask is None else mask[start:end]), 2)
        torch.testing.assert_close(own.x, whole.x[kept])
        torch.testing.assert_close(own.y, whole.y[kept])
        gathered = shard.gather(own.y.float().square().sum((1, 2)))
        torch.testing.assert_close(gathered, whole.y.float().square().sum((1, 2)))
        with shard.alone():
            assert own.count() == whole.rows
        assert shard.join(base.layers[kept]) == base.layers


@pytest.mark.parametrize(
    ("count", "sequences", "dtype"),
    [
        (2, 7, "float32"),
        pytest.param(3, 2, "float32", marks=pytest.mark.slow),  # one process has no sequence
        pytest.param(4, 7, "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_all_rows_of_a_layer_come_to_its_owner_in_their_order(
    fork_server: ForkServer, count: int, sequences: int, dtype: str
) -> None:
    """Also if they are padded, and if the processes run the base a different number of times."""
    finished = [p.wait() for p in fork_server.start_processes(count, hand_over_rows, [sequences, dtype])]
    assert [each.returncode for each in finished] == [0] * count, finished[0].stderr


def test_every_layer_has_one_owner_and_shares_differ_by_one_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    for layers in range(1, 9):
        for count in range(1, layers + 1):
            monkeypatch.setattr("bilinear_tc.train.shard.process_count", lambda count=count: count)
            owned = []
            for rank in range(count):
                monkeypatch.setattr("bilinear_tc.train.shard.process_index", lambda rank=rank: rank)
                owned.append(Shard(layers, shared_out=True).own)
            assert [layer for own in owned for layer in own] == list(range(layers))
            assert max(map(len, owned)) - min(map(len, owned)) <= 1
            most = max((rank + 1) * 7 // count - rank * 7 // count for rank in range(count))  # of 7 sequences
            assert Shard(layers).sequences(7) == most
            assert Shard(layers, shared_out=True).sequences(7) == (most if count == 1 else 7)


def test_layers_are_shared_out_where_all_would_not_fit(monkeypatch: pytest.MonkeyPatch, neox: Base, capsys) -> None:
    """A layer of width 16 and 64 units: 3,072 weights, as many gradients, and equations of 64 × 80, more than momenta;
    and of 3 sequences of 8 tokens two are a process's, their rows 16 + 16 numbers."""
    free = 3 * (2 * 4 * 3072 + 8 * 64 * (64 + 16) + 2 * 8 * 32 * 4)
    monkeypatch.setattr(fitter, "process_count", lambda: 2)
    monkeypatch.setattr("bilinear_tc.train.shard.process_count", lambda: 2)
    for asked, room, expected in (
        ("auto", free, False),
        ("auto", free - 1, True),
        ("none", 0, False),
        ("layers", 2 * free, True),
    ):
        monkeypatch.setattr(fitter, "free_memory", lambda _device, room=room: room)
        assert fitter.choose_shard(Recipe(shard=asked, batch_size=3, seq_len=8), neox, CPU).shared_out == expected
        told = "each process holds layers of its own" if expected else "each process holds all layers"
        (line,) = capsys.readouterr().out.splitlines()
        assert line.startswith(f"{told}: 0.0 GiB for all 3, ")


def test_a_joint_finish_without_room_for_all_layers_is_refused(monkeypatch: pytest.MonkeyPatch, neox: Base) -> None:
    """A layer of width 16 and 64 units: 3,072 weights, as they were before a step too, gradients and momenta; and 24
    rows of 16 + 16 numbers."""
    room = 3 * (4 * 4 * 3072 + 24 * 32 * 4)
    recipe = Recipe(finish="joint", batch_size=3, seq_len=8)
    monkeypatch.setattr(fitter, "free_memory", lambda _device: room)
    assert not fitter.choose_shard(recipe, neox, CPU).shared_out
    monkeypatch.setattr(fitter, "free_memory", lambda _device: room - 1)
    with pytest.raises(UserError, match=r"--finish joint holds all .*: expected 0\.0 GiB free for 3"):
        fitter.choose_shard(recipe, neox, CPU)


@pytest.fixture(scope="module")
def deep(tiny_fit: TinyFit, tmp_path_factory: pytest.TempPathFactory) -> TinyFit:
    """The tiny fit with a base of five layers, which neither 2, 3 nor 4 processes divide."""
    folder = tmp_path_factory.mktemp("deep")
    shutil.copytree(tiny_fit.base, folder / "base")
    vocabulary = json.loads((folder / "base" / "config.json").read_text())["vocab_size"]
    tiny_neox(vocab_size=vocabulary, num_hidden_layers=5, intermediate_size=32).save_pretrained(folder / "base")
    return TinyFit(tiny_fit.server, folder / "base", tiny_fit.text, folder)


def shared_out(fit: TinyFit, count: int, run: Path, *flags: object, **more: object) -> list[Finished]:
    return [process.wait() for process in fit.start_processes(count, run, "--shard", "layers", *flags, **more)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "flags"),
    [
        (2, ()),
        (3, ("--no_pack",)),
        (4, ("--normalization", "batch", "--micro_batch_size", 2)),
        (2, ("--init", "random", "--optimizer", "adamw", "--jvp", 0.1)),
    ],
)
def test_curves_and_weights_are_those_of_one_process(
    deep: TinyFit, tmp_path: Path, count: int, flags: tuple[object, ...]
) -> None:
    settings, run = ("--max_steps", 8, *flags), tmp_path / "run"
    for finished in shared_out(deep, count, run, *settings):
        assert finished.returncode == 0, finished.stderr
    assert_close_layers(run, deep.reference(*settings))


@pytest.mark.slow
def test_what_it_measures_at_its_end_is_what_one_process_measures(deep: TinyFit, tmp_path: Path) -> None:
    """The start beside the end, and all that train/evaluate.py measures without losses."""
    write_text(deep.folder / "more", shards=7)  # of which the fit's text has the first six
    flags = ("--max_steps", 3, "--eval_split", deep.folder / "more" / "shard-6.jsonl", "--eval_tokens", 1500)
    run, reference = tmp_path / "run", deep.reference(*flags)
    for finished in shared_out(deep, 3, run, *flags):
        assert finished.returncode == 0, finished.stderr
    facts = [yaml.safe_load((r / "layer_3" / "config.yaml").read_text())["fit"] for r in (run, reference)]
    for name in ("fvu_start", "fvu_end"):
        assert facts[0][name] == pytest.approx(facts[1][name], rel=1e-4)

    arguments = ["--transcoders", run, "--output", tmp_path / "out", "--batch_size", 22, "--loss_tokens"]
    evaluated = [p.wait() for p in deep.server.start_processes(2, evaluate.main, [*arguments, 0])]
    assert [finished.returncode for finished in evaluated] == [0, 0], evaluated[0].stderr
    expected = json.loads((reference / "evaluation.json").read_text())["layers"]
    for folder in (run, tmp_path / "out"):
        found = json.loads((folder / "evaluation.json").read_text())["layers"]
        assert found.keys() == expected.keys()
        for layer, scores in expected.items():
            for name in ("fvu", "fvu_raw", "fvu_linear", "fvu_ordinary", "fvu_se", "jacobian_cosine", "halfway"):
                assert found[layer][name] == pytest.approx(scores[name], rel=1e-3), (folder, layer, name)


@pytest.mark.slow
def test_it_goes_on_with_the_same_bits_and_on_any_number_of_processes(deep: TinyFit, tmp_path: Path) -> None:
    """Killed while the layers' states of step 8 are written, in parallel."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    settings = ("--max_steps", 12)
    assert [finished.returncode for finished in shared_out(deep, 2, whole, *settings)] == [0, 0]
    killed = shared_out(deep, 2, run, *settings, sabotage=("die_at", "os.rename", ".partial/step_00000008", "0"))
    assert -signal.SIGKILL in [finished.returncode for finished in killed]
    assert checkpoints(run) == [0, 4]
    shutil.copytree(run, tmp_path / "copy")

    resumed = shared_out(deep, 2, run, *settings)
    assert [finished.returncode for finished in resumed] == [0, 0], resumed[0].stderr
    assert f"resuming {run} after step 4 of 12" in resumed[0].stdout
    assert_same_layers(run, whole)
    assert partial(run) == []

    alone = deep.run(tmp_path / "copy", *settings)
    assert f"resuming {tmp_path / 'copy'} after step 4 of 12" in alone.stdout, alone.stderr
    assert_close_layers(tmp_path / "copy", whole)


@pytest.mark.slow
def test_of_four_processes_one_is_killed_and_three_go_on(deep: TinyFit, tmp_path: Path) -> None:
    run, settings = tmp_path / "run", ("--max_steps", 12, "--checkpoint_every", 2)
    fits = deep.start_processes(4, run, "--shard", "layers", *settings)
    wait_until(lambda: checkpoints(run)[-1:] > [2])
    fits[2].kill()
    ended = [process.wait() for process in fits]
    assert [finished.returncode for finished in ended] == [1, 1, -signal.SIGKILL, 1]
    for process in (0, 1, 3):
        assert ended[process].errors == [f"error (process {process}): {LOST}" if process else f"error: {LOST}"]
    assert_loads(run)
    last = checkpoints(run)[-1]

    resumed = shared_out(deep, 3, run, *settings)
    assert [finished.returncode for finished in resumed] == [0, 0, 0], resumed[0].stderr
    assert f"resuming {run} after step {last} of 12" in resumed[0].stdout
    assert partial(run) == []
    assert_close_layers(run, deep.reference("--max_steps", 12))


@pytest.mark.slow
def test_a_nan_in_a_layer_that_one_process_owns_ends_all_with_the_sentence(deep: TinyFit, tmp_path: Path) -> None:
    base = shutil.copytree(deep.base, tmp_path / "base")
    model = GPTNeoXForCausalLM.from_pretrained(base)
    model.gpt_neox.layers[4].mlp.dense_4h_to_h.bias.data[0] = torch.nan
    model.save_pretrained(base)
    ended = shared_out(deep, 2, tmp_path / "run", "--base", base)
    sentence = "the MLP output of layer 4 holds a NaN or an infinity at the calibration sample: expected finite"
    for finished, prefix in zip(ended, ("error:", "error (process 1):"), strict=True):
        assert finished.returncode == 1
        assert finished.stderr.count(f"{prefix} {sentence}") == 1, finished.stderr


@pytest.mark.slow
def test_fewer_layers_than_processes_are_refused(tiny_fit: TinyFit, tmp_path: Path) -> None:
    main, *others = shared_out(tiny_fit, 3, tmp_path / "run")
    sentence = (
        "--shard layers gives each process layers of its own: expected at most 2 processes for 2 layers, got 3; start "
        "fewer, or use --shard none"
    )
    assert main.errors == [f"error: {sentence}"]
    assert [finished.returncode for finished in (main, *others)] == [1, 1, 1]
