"""Whatever befalls a fit, it ends with one clear sentence, what it has saved stays good, and it goes on from there."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import zstandard
from bases import tiny_neox, write_base, write_base_of_words
from fitting import TinyFit, assert_loads, assert_same_layers, checkpoints, layers, partial, write_text
from hub_server import HubServer
from hub_storage import HubError
from loading import load_in_fresh_process
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTNeoXConfig

from bilinear_tc.train import fit
from bilinear_tc.train.errors import REPORT

TOKENS_A_STEP, CALIBRATION_STEPS = 22 * 32, 3


def adapter(folder: Path) -> Path:
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text("{}")
    return folder / "adapter"


def file_in_the_way(folder: Path) -> Path:
    (folder / "file").write_text("")
    return folder / "file" / "run"


def empty_folder(folder: Path) -> Path:
    (folder / "empty").mkdir()
    return folder / "empty"


def base_without_weights(folder: Path) -> Path:
    """A base of 16 positions that cannot be read any further than its config."""
    GPTNeoXConfig(max_position_embeddings=16, num_hidden_layers=2).save_pretrained(folder / "base")
    return folder / "base"


def base_with_a_tokenizer_of_another_package(folder: Path) -> Path:
    base = write_base(folder / "base")
    (base / "tokenizer.json").unlink()
    (base / "tokenizer_config.json").write_text('{"tokenizer_class": "CpmAntTokenizer"}')
    return base


def damaged(**settings: object) -> Callable[[Path], Path]:
    """A base whose config.json says something else."""

    def write(folder: Path) -> Path:
        config = write_base(folder / "base") / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | settings if settings else None))
        return folder / "base"

    return write


def base_that_lacks_a_tensor(folder: Path) -> Path:
    weights = write_base(folder / "base") / "model.safetensors"
    tensors = load_file(weights)
    del tensors["gpt_neox.layers.1.mlp.dense_4h_to_h.weight"]
    save_file(tensors, weights, {"format": "pt"})
    return folder / "base"


def base_with_code_of_its_own(folder: Path) -> Path:
    """It writes a file when its code runs."""
    auto_map = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    base = damaged(auto_map=auto_map, model_type="own")(folder)
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("embed_out.weight")  # as the class calls it, if not what GPT-NeoX does
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    code = f"""
from pathlib import Path
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

Path({str(folder / "ran")!r}).touch()

class OwnConfig(GPTNeoXConfig):
    model_type = "own"

class OwnModel(GPTNeoXForCausalLM):
    config_class = OwnConfig
"""
    (base / "own.py").write_text(code)
    return base


def parquet_text(folder: Path) -> Path:
    """In a folder whose name is a pattern."""
    (folder / "text[1]").mkdir()
    pq.write_table(pa.table({"text": ["some text " * 100] * 500}), folder / "text[1]" / "a.parquet")
    return folder / "text[1]" / "a.parquet"


def empty_text(folder: Path) -> Path:
    (folder / "empty.jsonl").write_text("\n\n")
    return folder / "empty.jsonl"


@pytest.mark.parametrize(
    ("flag", "value", "sentence"),
    [
        ("--layers", "1,7", "the base has layers 0 to 1, but layers 7 were asked for"),
        ("--seq_len", 65, "the base takes sequences of up to 64 tokens, but seq_len is 65; lower it with --seq_len"),
        ("--base", base_without_weights, "the base takes sequences of up to 16 tokens, but seq_len is 32"),
        ("--base", empty_folder, "the base '.*/empty' cannot be loaded: expected a Hugging Face model"),
        ("--base", base_with_a_tokenizer_of_another_package, "the base '.*/base' cannot be loaded: .* CpmAntTokenizer"),
        ("--base", damaged(hidden_act="swoosh"), "the base '.*/base' cannot be loaded: .* got: unknown 'swoosh'"),
        ("--base", damaged(num_attention_heads=3), "the base '.*/base' cannot be loaded: .* got: .*heads"),
        ("--base", damaged(), "the base '.*/base' cannot be loaded: expected a Hugging Face model"),
        (
            "--base",
            base_that_lacks_a_tensor,
            "the base '.*/base' cannot be loaded: .* lack gpt_neox.layers.1.mlp.dense_4h",
        ),
        ("--base", base_with_code_of_its_own, "the base '.*/base' .* the flag for that is --trust_remote_code"),
        ("--base", adapter, "the base '.*/adapter' is a PEFT adapter: expected a whole model; merge it first"),
        ("--base", "nobody/nothing", "the base 'nobody/nothing' cannot be loaded: expected a Hugging Face model"),
        ("--dataset", empty_text, "the split 'train' of '.*/empty.jsonl' holds no text"),
        ("--dataset", "/nowhere/text", "there is no file or folder '/nowhere/text'"),
        ("--text_column", "body", "line 1 of .*/shard-0.jsonl has no column 'body'; its columns are 'text'"),
        ("--eval_split", "validation", "no held-out text: .* has no split 'validation'; .* or none to measure nothing"),
        ("--eval_split", "train", "the fit is on the split 'train', and so is eval_split"),
        ("--output_dir", file_in_the_way, "output_dir .*/file/run cannot be written .*: expected a folder"),
        ("--output_dir", "/proc/self/run", "output_dir /proc/self/run cannot be written .*: expected a folder"),
        ("--hidden_multiplier", 0, "n_hidden must be at least 1"),
        ("--hidden_multiplier", 0.01, "n_hidden must be at least 1, got 0 from hidden_multiplier 0.01 and inputs of"),
        ("--batch_size", 100_000, "the text is too short: it holds .* fewer than one batch of 100000"),
        ("--recipe", "unknown", "no recipe 'unknown': expected one of pythia-410m, "),
        ("--report_to", "trackio", "the package trackio is not installed"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(
    tiny_fit: TinyFit, tmp_path: Path, flag: str, value: str | Callable[[Path], Path], sentence: str
) -> None:
    value = value(tmp_path) if callable(value) else value
    finished = tiny_fit.run(tmp_path / "run", flag, value, sabotage=("hide_package", "trackio"))
    assert finished.returncode == 1
    (error,) = finished.errors
    assert re.match(f"error: .*{sentence}", error)
    assert "Traceback" not in finished.stderr
    assert not (tmp_path / "run" / "layer_0").exists()


@pytest.mark.slow
def test_a_bases_own_code_runs_with_the_flag_alone(tiny_fit: TinyFit, tmp_path: Path) -> None:
    base, run = base_with_code_of_its_own(tmp_path), tmp_path / "run"
    flags = ("--base", base, "--max_steps", 0)
    assert tiny_fit.run(run, *flags).returncode == 1
    assert not (tmp_path / "ran").exists()
    done = tiny_fit.run(run, *flags, "--trust_remote_code")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "ran").exists()


@pytest.mark.slow
def test_a_token_that_the_base_has_not_is_named_and_costs_no_step(tiny_fit: TinyFit, tmp_path: Path) -> None:
    """The base's embedding has 50 rows, and the tokenizer, of another model, 60 words."""
    words = [f"w{number}" for number in range(60)]
    base = write_base_of_words(tmp_path / "base", tiny_neox(), words, WhitespaceSplit())
    chance, text = random.Random(0), tmp_path / "text.txt"
    common = " ".join(chance.choices(words[:40], k=TOKENS_A_STEP * 9 + TOKENS_A_STEP // 2))
    text.write_text(f"{common} w59 {common}")
    run = tmp_path / "run"
    finished = tiny_fit.run(run, "--base", base, "--dataset", text, "--shuffle_buffer", 0)
    steps = 9 - CALIBRATION_STEPS
    (error,) = finished.errors
    assert error == (
        "error: expected the base's own tokenizer, got the token 60 for an embedding of 50 rows "
        f"(all {steps} steps before it are saved in {run})"
    )
    assert "Traceback" not in finished.stderr
    assert checkpoints(run)[-1] == steps


def test_an_unknown_flag_is_refused_at_once(tiny_fit: TinyFit, tmp_path: Path) -> None:
    finished = tiny_fit.run(tmp_path / "run", "--learning_rate", 1)
    assert finished.returncode == 2
    assert "unrecognized arguments: --learning_rate 1" in finished.stderr
    assert not (tmp_path / "run").exists()


def late_token(tiny_fit: TinyFit) -> tuple[int, int]:
    """A token that the fit's text holds from a late step on, not the one after a checkpoint, and that step."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_fit.base)
    stream: list[int] = []
    for line in (tiny_fit.text / "shard-0.jsonl").read_text().splitlines():
        stream += [*tokenizer(json.loads(line)["text"])["input_ids"], tokenizer.eos_token_id]
    first = {token: position for position, token in reversed(list(enumerate(stream)))}
    steps = {token: position // TOKENS_A_STEP + 1 - CALIBRATION_STEPS for token, position in first.items()}
    return next((token, step) for token, step in steps.items() if 10 <= step <= 15 and step % 4 != 1)


@pytest.mark.slow
def test_a_nan_in_the_base_is_named_with_its_layer_and_step(tiny_fit: TinyFit, tmp_path: Path) -> None:
    base, run = tmp_path / "base", tmp_path / "run"
    token, step = late_token(tiny_fit)
    shutil.copytree(tiny_fit.base, base)
    model = AutoModelForCausalLM.from_pretrained(base)
    model.gpt_neox.embed_in.weight.data[token] = torch.nan
    model.save_pretrained(base)
    settings = ("--base", base, "--shuffle_buffer", 0)

    finished = tiny_fit.run(run, *settings)
    assert finished.returncode == 1
    (error,) = finished.errors
    assert error.startswith(
        f"error: the MLP input of layer 0 holds a NaN or an infinity at step {step}: expected finite"
    )
    assert [history.num_rows for _, history in layers(run).values()] == [step - 1, step - 1]
    assert checkpoints(run)[-1] == (step - 1) // 4 * 4
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    loads = [{"subfolder": "layer_0"}, {"subfolder": "layer_1"}]
    for _, _, output in load_in_fresh_process(run, loads, environment, tmp_path / "outputs.pt"):
        assert output.isfinite().all()

    shutil.copyfile(tiny_fit.base / "model.safetensors", base / "model.safetensors")
    assert tiny_fit.run(run, *settings).returncode == 0
    assert_same_layers(run, tiny_fit.reference("--shuffle_buffer", 0))


def test_a_diverging_fit_says_so_and_leaves_the_layers_finite(tiny_fit: TinyFit, tmp_path: Path) -> None:
    run = tmp_path / "run"
    finished = tiny_fit.run(run, "--lr", 1e30)
    (error,) = finished.errors
    assert re.match(
        r"error: the transcoder of layer \d has diverged by step \d+: .* start anew with a lower --lr", error
    )
    assert_loads(run)


@pytest.mark.parametrize("flag", ["--max_steps", "--checkpoint_every"])
def test_a_diverged_last_update_is_not_saved(tiny_fit: TinyFit, tmp_path: Path, flag: str) -> None:
    """The first update, of parameters still finite, is the last one or is followed by a checkpoint."""
    run = tmp_path / "run"
    finished = tiny_fit.run(run, "--lr", 1e30, flag, 1)
    assert finished.returncode == 1
    (error,) = finished.errors
    assert re.match(r"error: the transcoder of layer 0 has diverged by step 1: .* start anew with a lower --lr", error)
    assert checkpoints(run) == [0]
    assert [history.num_rows for _, history in layers(run).values()] == [0, 0]
    assert_loads(run)


def broken_line(folder: Path) -> Callable[[], None]:
    """Breaks a line in the middle of the first shard; returns what mends it."""
    shard = folder / "shard-0.jsonl"
    whole = shard.read_bytes()
    lines = whole.splitlines(keepends=True)
    lines[len(lines) // 2] = b'{"text": "torn\n'
    shard.write_bytes(b"".join(lines))
    return lambda: shard.write_bytes(whole) and None


def truncated_shard(folder: Path) -> Callable[[], None]:
    """Makes a zstd file of the shards and cuts it short; returns what mends it."""
    compressor, whole = zstandard.ZstdCompressor().compressobj(), b""
    for shard in sorted(folder.iterdir()):
        for line in shard.read_bytes().splitlines(keepends=True):
            whole += compressor.compress(line) + compressor.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
        shard.unlink()
    whole += compressor.flush()
    (folder / "all.jsonl.zst").write_bytes(whole[: len(whole) // 8])
    return lambda: (folder / "all.jsonl.zst").write_bytes(whole) and None


@pytest.mark.parametrize(
    ("break_text", "sentence"),
    [
        (broken_line, r"line \d+ of .*/shard-0.jsonl is not JSON"),
        (truncated_shard, "all.jsonl.zst cannot be read past line .* in the middle of a zstd frame"),
    ],
)
@pytest.mark.slow
def test_broken_text_is_named_and_costs_no_step(
    tiny_fit: TinyFit, tmp_path: Path, break_text: Callable[[Path], Callable[[], None]], sentence: str
) -> None:
    run, text = tmp_path / "run", tmp_path / "text"
    write_text(text)
    mend = break_text(text)
    settings = ("--dataset", text / "*.jsonl*")
    finished = tiny_fit.run(run, *settings)
    assert finished.returncode == 1
    (error,) = finished.errors
    assert re.search(sentence, error)
    steps = int(re.search(rf"\(all (\d+) steps before it are saved in {run}\)$", error)[1])
    assert 0 < steps < 24
    assert checkpoints(run)[-1] == steps
    assert [history.num_rows for _, history in layers(run).values()] == [steps, steps]
    assert_loads(run)

    mend()
    resumed = tiny_fit.run(run, *settings)
    assert f"after step {steps} of 24" in resumed.stdout
    assert_same_layers(run, tiny_fit.reference())


@pytest.mark.parametrize(
    ("full_at", "size", "sentence", "last", "rows"),
    [
        (
            "step_00000012",
            20_000,
            "the checkpoint .*/step_00000012.pt could not be written .*: that of step 8 is whole; make room",
            8,
            [8, 8],
        ),
        (
            "layer_1/.layer_1",
            6_000,
            "the layers could not all be written to .*: those that are there are whole, .*; make room on the disk",
            4,
            [4, 0],
        ),
    ],
)
@pytest.mark.slow
def test_a_full_disk_leaves_what_was_saved(
    tiny_fit: TinyFit, tmp_path: Path, full_at: str, size: int, sentence: str, last: int, rows: list[int]
) -> None:
    """While a checkpoint is written, and while layers are; the disk is full for any file larger than `size`."""
    run = tmp_path / "run"
    finished = tiny_fit.run(run, sabotage=("fill_disk_at", full_at, size))
    assert finished.returncode == 1
    (error,) = finished.errors
    assert re.match(f"error: {sentence}", error)
    assert checkpoints(run)[-1] == last
    assert partial(run) == []
    assert [history.num_rows for _, history in layers(run).values()] == rows
    assert_loads(run)

    assert f"after step {last} of 24" in tiny_fit.run(run).stdout
    assert_same_layers(run, tiny_fit.reference())


def test_a_bug_keeps_its_traceback_and_says_where_to_report_it(tiny_fit: TinyFit, tmp_path: Path) -> None:
    finished = tiny_fit.run(tmp_path / "run", sabotage=("make_a_mistake",))
    assert finished.returncode == 1
    lines = finished.stderr.strip().splitlines()
    assert "Traceback (most recent call last):" in lines
    assert any("in fit_layers" in line for line in lines)
    assert lines[-2] == "KeyError: 'no such key'"
    assert lines[-1] == f"error: this is a bug in bilinear-tc: please report it, with the lines above, at {REPORT}"


@pytest.mark.slow
@pytest.mark.parametrize("dataset", [None, parquet_text])
def test_a_cache_that_cannot_be_written_is_named(
    tiny_fit: TinyFit, tmp_path: Path, dataset: Callable[[Path], Path] | None
) -> None:
    flags = tiny_fit.flags(tmp_path / "run", *(("--dataset", dataset(tmp_path)) if dataset else ()))
    environment = tiny_fit.server.environment | {"HF_HOME": "/proc/self/home"}
    (error,) = tiny_fit.server.start(fit.main, flags, environment=environment).wait().errors
    assert re.match(r"error: the cache /proc/self/home cannot be used \(.*\): set HF_HOME to a folder", error), error


@pytest.mark.slow
def test_folders_of_any_name(tiny_fit: TinyFit, tmp_path: Path) -> None:
    text, run = tmp_path / "a,b*c?", tmp_path / "runs, [of mine]" / "run*"
    write_text(text, shards=2)
    done = tiny_fit.run(run, "--dataset", text, "--max_steps", 2)
    assert done.returncode == 0, done.stderr
    assert_loads(run)
    assert tiny_fit.run(run, "--dataset", parquet_text(tmp_path), "--max_steps", 2, "--no_resume", "--overwrite").output
    (error,) = tiny_fit.run(tmp_path / "other", "--dataset", tmp_path / "text[1]").errors
    assert re.match(r"error: '.*/text\[1\]' is taken for a pattern: rename it, or name ", error), error


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["private", "gated"])
def test_a_base_that_asks_for_a_login_says_the_whole_remedy(tiny_fit: TinyFit, tmp_path: Path, kind: str) -> None:
    def gate() -> None:
        message = "Access to model tester/base is restricted. You must have access to it and be authenticated to it."
        raise HubError(403, message, "GatedRepo")

    with HubServer(tmp_path / "hub") as hub:
        hub.create("tester/base", private=kind == "private")
        hub.put("tester/base", {path.name: path for path in tiny_fit.base.iterdir()})
        if kind == "gated":
            hub.fail(1, gate, times=100)
        flags = tiny_fit.flags(tmp_path / "run", "--base", "tester/base")
        fit_there = tiny_fit.server.start(fit.main, flags, environment=hub.environment(tmp_path / "home"))
        (error,) = fit_there.wait().errors
    remedy = {
        "private": "make sure to pass a token having permission to this repo either by logging in with `hf auth login`",
        "gated": "Make sure to have access to it at https://huggingface.co/tester/base",
    }
    assert remedy[kind] in error, error
