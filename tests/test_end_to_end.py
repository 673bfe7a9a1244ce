"""From the README's quickstart to a reader of the Hub: fit, evaluate, publish, load, all by the real commands."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub_server import HubServer
from loading import load_in_fresh_process, saved_output
from quickstart import LAYERS, REPOSITORY
from transformers import AutoModelForCausalLM, AutoTokenizer

from bilinear_tc.modeling_bilinear_tc import BilinearTC
from bilinear_tc.train.text.documents import python_stdlib_files

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def evaluated_run(quickstart_run, tmp_path_factory) -> Path:
    """A copy of the quickstart's run after `accelerate launch train/evaluate.py --transcoders RUN`."""
    run = tmp_path_factory.mktemp("evaluated") / "quickstart"
    shutil.copytree(quickstart_run.folder, run)
    accelerate = Path(sys.executable).with_name("accelerate")
    command = [accelerate, "launch", "train/evaluate.py", "--transcoders", run, "--tokens", "16384"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "loss recovered" in done.stdout
    return run


def test_every_layer_keeps_its_figures_and_the_base_its_loss(evaluated_run):
    evaluation = json.loads((evaluated_run / "evaluation.json").read_text())
    assert (evaluation["dataset"], evaluation["split"], evaluation["tokens"]) == ("python-stdlib", "validation", 16384)
    assert set(evaluation["layers"]) == {str(layer) for layer in LAYERS}
    for figures in evaluation["layers"].values():
        assert 0 < figures["fvu"] < figures["fvu_linear"]
        assert figures["variance_explained"] == pytest.approx(1 - figures["fvu"])
        assert 0.7 < figures["loss_recovered"] < 1.01
    assert evaluation["all_layers"]["loss_recovered"] > 0.95
    assert evaluation["all_layers"]["ce_increase"] < 0.08 * evaluation["base"]["ce"]
    assert evaluation["all_layers"]["kl"] > 0


def test_the_evaluated_loss_is_the_bases_own_on_the_held_out_files(evaluated_run):
    """The first 16,384 held-out tokens, tokenised and cut here, one sequence at a time."""
    evaluation = json.loads((evaluated_run / "evaluation.json").read_text())
    base = AutoModelForCausalLM.from_pretrained(REPOSITORY / "train/quickstart").float()
    tokenizer = AutoTokenizer.from_pretrained(REPOSITORY / "train/quickstart")
    tokens: list[int] = []
    for file in python_stdlib_files()["validation"]:
        text = Path(file).read_text(encoding="utf-8", errors="replace")
        tokens += [*tokenizer(text, verbose=False)["input_ids"], tokenizer.eos_token_id]
        if len(tokens) > 16384:
            break
    sequences = torch.tensor(tokens[:16384]).view(-1, 128)
    with torch.no_grad():
        losses = [base(s[None], labels=s[None]).loss.item() for s in sequences]
    assert math.fsum(losses) / len(losses) == pytest.approx(evaluation["base"]["ce"], rel=1e-4)


def test_the_run_is_published_and_every_layer_loads_from_the_hub(evaluated_run, tmp_path):
    with HubServer(tmp_path / "hub") as hub:
        environment = hub.environment(tmp_path / "publisher", token=hub.token)
        command = [sys.executable, "upload/publish.py", evaluated_run, "--repo_id", "tester/quickstart"]
        done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        files = hub.files("tester/quickstart", "main")
        assert "figures/training_curves_overlaid_layers_0_5.png" in files
        assert not [path for path in files if path.startswith("checkpoints")]

        loads = [{"subfolder": f"layer_{layer}"} for layer in LAYERS]
        reader = hub.environment(tmp_path / "reader")
        outputs = load_in_fresh_process("tester/quickstart", loads, reader, tmp_path / "outputs.pt")
        for layer, (_, _, output) in zip(LAYERS, outputs, strict=True):
            assert torch.equal(output, saved_output(evaluated_run, layer))

        command = [sys.executable, "train/evaluate.py", "--transcoders", "tester/quickstart", "--tokens", "4096"]
        done = subprocess.run(
            [*command, "--output", tmp_path / "measured"], cwd=REPOSITORY, env=reader, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-4000:]
        assert json.loads((tmp_path / "measured" / "evaluation.json").read_text())["tokens"] == 4096


def test_the_bare_replacement_costs_what_the_evaluator_says(evaluated_run):
    """All layers attached at once, by hand, on other held-out text than the evaluator's."""
    base = AutoModelForCausalLM.from_pretrained(REPOSITORY / "train/quickstart").float()
    tokenizer = AutoTokenizer.from_pretrained(REPOSITORY / "train/quickstart")
    text = Path(python_stdlib_files()["validation"][-1]).read_text(encoding="utf-8", errors="replace")
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    sequences = ids[: len(ids) // 128 * 128].view(-1, 128)[:32]
    transcoders = [BilinearTC.from_pretrained(evaluated_run / f"layer_{layer}") for layer in LAYERS]
    with torch.no_grad():
        before = base(sequences, labels=sequences).loss.item()
        with contextlib.ExitStack() as attached:
            for transcoder in transcoders:
                attached.enter_context(transcoder.attached(base))
            replaced = base(sequences, labels=sequences).loss.item()
        assert base(sequences, labels=sequences).loss.item() == before
    assert before < replaced < 1.1 * before
