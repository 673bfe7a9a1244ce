"""The README's quickstart, for real, by its commands: fit, snippets, evaluation, publication, a reader of the Hub."""

from __future__ import annotations

import contextlib
import html
import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import nbformat
import pyarrow.parquet
import pytest
import torch
import yaml
from hub_server import HubServer
from loading import load_in_fresh_process, saved_output
from make_tour import NOTEBOOK, PAGE, executed
from quickstart import LAYERS, README, REPOSITORY, QuickstartRun, run_quickstart
from safetensors.torch import load_file
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from bilinear_tc.modeling_bilinear_tc import BilinearTC
from bilinear_tc.train.recipe import Recipe, parse_recipe, read_settings
from bilinear_tc.train.text.documents import python_stdlib_files

BASE = REPOSITORY / "train" / "quickstart"


@pytest.fixture(scope="module")
def quickstart_run(tmp_path_factory: pytest.TempPathFactory) -> QuickstartRun:
    """The quickstart command, once; in this file alone, since workers share nothing."""
    return run_quickstart(tmp_path_factory.mktemp("runs") / "quickstart")


@pytest.fixture(scope="module")
def base() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(BASE).float().eval()


@pytest.fixture(scope="module")
def held_out() -> torch.Tensor:
    """[128, 128] tokens of the held-out files, from the last one backwards."""
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    ids: list[int] = []
    for file in reversed(python_stdlib_files()["validation"]):
        ids += tokenizer(Path(file).read_text(encoding="utf-8", errors="replace"), verbose=False)["input_ids"]
        if len(ids) >= 128 * 128:
            break
    return torch.tensor(ids[: 128 * 128]).view(128, 128)


def test_the_base_is_small_enough_to_ship():
    assert sum(file.stat().st_size for file in BASE.iterdir() if file.is_file()) <= 6_000_000


@torch.no_grad()
def test_the_base_is_trained_far_below_the_unigram_entropy(base, held_out):
    """The entropy of the very tokens that it is measured on, which no unigram model's loss on them can beat."""
    text = held_out[:32]
    log_probs = base(text).logits[:, :-1].double().log_softmax(-1)
    loss = -log_probs.gather(-1, text[:, 1:, None]).mean()
    counts = text.unique(return_counts=True)[1].double()
    frequencies = counts / counts.sum()
    entropy = -(frequencies * frequencies.log()).sum()
    assert loss < 0.6 * entropy


@pytest.mark.slow
def test_the_run_holds_what_the_readme_says(quickstart_run):
    run = quickstart_run.folder
    files = {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}
    ofs_layer = ("config.json", "config.yaml", "history.parquet", "model.safetensors")
    code = {"configuration_bilinear_tc.py", "modeling_bilinear_tc.py"}
    expected = {
        "recipe.yaml",
        "evaluation.json",
        "exported.json",
        *code,
        *(f"layer_{i}/{name}" for i in LAYERS for name in ofs_layer),
    }
    assert {name for name in files if not name.startswith("checkpoints/")} == expected

    recipe = replace(parse_recipe(["--recipe", "quickstart", "--output_dir", str(run)]), bos="none")  # as found
    assert Recipe(**read_settings(run / "recipe.yaml")) == recipe
    checkpoints = {path.name for path in (run / "checkpoints").glob("*.pt")}
    kept = [f"step_{step:08d}" for step in (recipe.max_steps - recipe.checkpoint_every, recipe.max_steps)]
    assert checkpoints == {f"{name}{of}.pt" for name in kept for of in ("", *(f".{layer}" for layer in LAYERS))}

    for layer in LAYERS:
        described = yaml.safe_load((run / f"layer_{layer}" / "config.yaml").read_text())
        place = (described["layer"], described["base_model"], described["mlp_path"], described["n_hidden"])
        assert place == (layer, "train/quickstart", f"gpt_neox.layers.{layer}.mlp", 512)
        assert (described["optimizer"], described["fit"]["steps"]) == ("muon", recipe.max_steps)
        if not torch.cuda.is_available():
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
            assert described["fit"]["device"] == f"{cores} CPU threads"
        history = pyarrow.parquet.read_table(run / f"layer_{layer}" / "history.parquet")
        assert history.column_names == ["step", "tokens", "mse", "variance_explained", "fvu"]
        assert history["step"].to_pylist() == list(range(1, recipe.max_steps + 1))
        batch = recipe.batch_size * recipe.seq_len
        calibration = -(-recipe.init_tokens // batch) * batch
        assert history["tokens"].to_pylist() == [calibration + step * batch for step in history["step"].to_pylist()]
        assert history["variance_explained"][-1].as_py() == 1 - history["fvu"][-1].as_py()


@pytest.mark.slow
def test_a_layers_settings_say_what_the_fit_chose(tiny_fit, tmp_path):
    for micro_batch_size, flags in ((22, ()), (5, ("--micro_batch_size", 5))):
        run = tmp_path / f"run-{micro_batch_size}"
        assert tiny_fit.run(run, "--max_steps", 1, *flags).returncode == 0
        facts = yaml.safe_load((run / "layer_1" / "config.yaml").read_text(encoding="utf-8"))["fit"]
        assert facts["micro_batch_size"] == micro_batch_size
        assert facts["base_commit"] is None


WRITER = """
import sys
from pathlib import Path
from bilinear_tc.configuration_bilinear_tc import BilinearTCConfig
from bilinear_tc.modeling_bilinear_tc import BilinearTC
from bilinear_tc.train.layer_settings import layer_settings
from bilinear_tc.train.recipe import Recipe
from bilinear_tc.train.run import HISTORY_COLUMNS, Run

run, recipe = Path(sys.argv[1]), Recipe(base="mod\\u00e8le")
(run / "checkpoints").mkdir(parents=True)
run = Run(run)
run.begin(recipe)
transcoder = BilinearTC(BilinearTCConfig(2, 2, 2, base_model=recipe.base, layer_index=0))
settings = layer_settings(transcoder.config, recipe, {"steps": 0})
run.write_layers([transcoder], [{name: [] for name in HISTORY_COLUMNS}], [settings], 0)
"""


@pytest.mark.slow
def test_a_run_is_written_in_utf8_whatever_the_locale(tmp_path):
    ascii_locale = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    command = [sys.executable, "-c", WRITER, str(tmp_path / "run")]
    done = subprocess.run(command, env=os.environ | ascii_locale, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert read_settings(tmp_path / "run" / "recipe.yaml")["base"] == "modèle"
    described = yaml.safe_load((tmp_path / "run" / "layer_0" / "config.yaml").read_text(encoding="utf-8"))
    assert described["base_model"] == "modèle"


@pytest.mark.slow
def test_it_prints_a_table_and_what_to_try_next(quickstart_run):
    evaluation = json.loads((quickstart_run.folder / "evaluation.json").read_text())
    rows = {row[0]: row[1:] for row in map(str.split, quickstart_run.printed.splitlines()) if len(row) == 10}
    for name, figures in [*evaluation["layers"].items(), ("mean", evaluation["mean"])]:
        fvu, error, start, ordinary, _, affine, cosine, _, worst = rows[name]
        assert float(fvu) == pytest.approx(figures["fvu"], abs=6e-5)
        assert float(error.lstrip("±")) == pytest.approx(figures["fvu_se"], abs=6e-5)
        assert float(start) > float(fvu)
        assert float(ordinary) == pytest.approx(figures["fvu_ordinary"], abs=6e-5)
        assert float(affine) == pytest.approx(figures["fvu_linear"], abs=6e-5)
        assert float(cosine) == pytest.approx(figures["jacobian_cosine"], abs=6e-4)
        assert name == "mean" or float(worst) == pytest.approx(min(figures["interchange"].values()), abs=6e-4)
    assert evaluation["mean"]["fvu"] <= evaluation["mean"]["fvu_linear"] / 3
    line = f'AutoModel.from_pretrained("{quickstart_run.folder}", subfolder="layer_0", trust_remote_code=True)'
    assert line in quickstart_run.printed


@torch.no_grad()
@pytest.mark.slow
def test_a_third_of_the_best_affine_maps_unexplained_variance(quickstart_run, base, held_out):
    """Both in float64, and the affine map solved on the very text it is measured on, which no fitted one can beat."""
    seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for layer in LAYERS:
        base.gpt_neox.layers[layer].mlp.register_forward_hook(
            lambda _, x, y, layer=layer: seen.update({layer: (x[0].flatten(0, 1), y.flatten(0, 1))})
        )
    base(held_out)
    ours, affine = [], []
    for layer, (x, y) in seen.items():
        transcoder = BilinearTC.from_pretrained(quickstart_run.folder / f"layer_{layer}").double()
        x, y = x.double(), y.double()
        variance = (y - y.mean(0)).square().sum(0)
        inputs = torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64)], dim=1)
        best = inputs @ (torch.linalg.pinv(inputs, rtol=1e-9) @ y)
        ours.append(((y - transcoder(x)).square().sum(0) / variance).mean())
        affine.append(((y - best).square().sum(0) / variance).mean())
    assert len(ours) == len(LAYERS)
    assert sum(ours) <= sum(affine) / 3


@pytest.mark.slow
def test_a_fresh_process_loads_the_written_weights_bit_for_bit(quickstart_run, tmp_path):
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    loads = [{"subfolder": f"layer_{layer}"} for layer in LAYERS]
    outputs = load_in_fresh_process(quickstart_run.folder, loads, environment, tmp_path / "outputs.pt")
    for layer, (index, _, output) in zip(LAYERS, outputs, strict=True):
        w = load_file(quickstart_run.folder / f"layer_{layer}" / "model.safetensors")
        x = torch.linspace(-2, 2, 6 * 128).reshape(2, 3, 128)
        z = (x - w["input_mean"]) / w["input_std"]
        hidden = linear(z, w["left.weight"], w["left.bias"]) * linear(z, w["right.weight"], w["right.bias"])
        expected = linear(hidden, w["head.weight"], w["head.bias"]) * w["output_std"] + w["output_mean"]
        assert index == layer
        assert torch.equal(output, expected)


@torch.no_grad()
@pytest.mark.slow
def test_all_layers_at_once_cost_the_base_at_most_eight_percent(quickstart_run, base, held_out):
    transcoders = [BilinearTC.from_pretrained(quickstart_run.folder / f"layer_{layer}") for layer in LAYERS]

    def loss() -> float:
        log_probs = base(held_out).logits[:, :-1].double().log_softmax(-1)
        return -log_probs.gather(-1, held_out[:, 1:, None]).mean().item()

    before = loss()
    with contextlib.ExitStack() as stack:
        for transcoder in transcoders:
            stack.enter_context(transcoder.attached(base))
        assert before < loss() <= 1.08 * before
    assert loss() == before


@pytest.fixture
def beside_the_run(tmp_path, quickstart_run) -> Path:
    """A folder that looks like the root of a clone in which the quickstart has run."""
    (tmp_path / "train").symlink_to(REPOSITORY / "train")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "quickstart").symlink_to(quickstart_run.folder)
    return tmp_path


@pytest.mark.slow
def test_python_snippets_run_as_printed(beside_the_run, tmp_path_factory):
    snippets = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert snippets
    environment = os.environ | {"HF_HOME": str(tmp_path_factory.mktemp("hf")), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(  # one after the other: each goes on from those before
        [sys.executable, "-c", "\n".join(snippets)], cwd=beside_the_run, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    unexplained = float(re.search(r"unexplained: ([\d.]+)", done.stdout)[1])
    loss, spliced = map(float, re.search(r"loss ([\d.]+), with the transcoder ([\d.]+)", done.stdout).groups())
    assert 0 < unexplained < 0.4
    assert abs(spliced - loss) < 0.2 * loss
    of_layers = re.search(r"by layer: \{0: .*, 3: ([\d.]+),", done.stdout)
    assert abs(float(of_layers[1]) - unexplained) < 0.1


@pytest.mark.slow
def test_the_tour_runs_and_what_it_tells_holds(beside_the_run):
    notebook = executed(beside_the_run)
    printed = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ()))
    kept = nbformat.read(NOTEBOOK, as_version=4)
    for cell, before in zip(notebook.cells, kept.cells, strict=True):
        kinds, kinds_before = ([output.output_type for output in of.get("outputs", ())] for of in (cell, before))
        assert kinds == kinds_before
    fires = printed.partition("R² of the transcoder's prediction of the true MLP's change: ")
    assert len(re.findall(r"^ *-.*⟦'\\n'⟧", fires[0], re.MULTILINE)) >= 6
    assert float(fires[2].split()[0]) > 0.9
    pairs = {(int(a), int(b)): float(r2) for a, b, r2 in re.findall(r"^\((\d), (\d)\) +(\S+)", printed, re.MULTILINE)}
    assert len(pairs) == 9
    assert all(r2 > 0.9 for (a, b), r2 in pairs.items() if b == a + 1 and a)
    assert all(r2 < 0.5 for (a, b), r2 in pairs.items() if b > a + 1)
    removals = [float(row.split()[-1]) for row in re.findall(r"^ +\d +0\.\d{4} .*", printed, re.MULTILINE)]
    assert len(removals) == len(LAYERS)
    assert removals.index(min(removals)) == 1


def test_the_tour_is_kept_as_it_ran_and_its_page_shows_it_without_asking_any_server():
    notebook, page = nbformat.read(NOTEBOOK, as_version=4), PAGE.read_text(encoding="utf-8")
    kept = NOTEBOOK.read_text(encoding="utf-8")
    assert not re.search(r"/home/|/tmp/|/Users/|site-packages|\"execution\"|Traceback|stderr", kept)
    assert max(len(kept), len(page)) < 1_000_000
    assert not re.search(r"<(script|link|iframe)|src=\"(?!data:)|url\((?!['\"]?data:)|@import", page)
    shown = re.sub(r"\s", "", html.unescape(re.sub(r"<[^>]*>", "", page)))
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == [*range(1, len(code) + 1)]
    for cell in code:
        printed = [output.text for output in cell.outputs if "text" in output]
        for text in (cell.source, *printed):
            assert re.sub(r"\s", "", text) in shown
    prose = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    for line in "\n".join(prose).splitlines():
        plain = re.sub(r"[\s`*#]|^- ", "", line)
        assert plain in shown
    figures = [
        output.data["image/png"].replace("\n", "") for cell in code for output in cell.outputs if "data" in output
    ]
    assert len(figures) == 3
    assert all(figure in page.replace("\n", "") for figure in figures)


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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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
