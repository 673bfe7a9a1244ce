"""Publishing a run: one commit or none, whatever happens on the way; what is on the Hub is what was in the run."""

from __future__ import annotations

import copy
import json
import math
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from forking import ForkServer
from hub_http import Fault
from hub_server import HubServer, copy_repository
from huggingface_hub import HfApi, ModelCard
from loading import load_in_fresh_process, saved_output
from publishing import Publisher
from safetensors.torch import load_file, save_file
from tiny_run import write_tiny_run

from bilinear_tc.modeling_bilinear_tc import BilinearTC
from bilinear_tc.train.run import Run
from bilinear_tc.upload.hub import HubRepository, XetError
from bilinear_tc.upload.local_files import hash_file, list_files
from bilinear_tc.upload.publish import Publication, same_outputs, show_plan
from bilinear_tc.upload.repository import LAYOUT, UnfitRun, build_repository, check_publishable

REPO = "tester/set"
OVER = {"dirs_exist_ok": True}
LAYER_FILES = {"config.json", "model.safetensors", "config.yaml", "history.parquet"}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_tiny_run(tmp_path / "run")


def local_hashes(folder: Path) -> dict[str, str]:
    """Path → sha256 of every file of a folder."""
    return {path: file.sha256 for path, file in list_files(folder).items()}


def published(hub: HubServer, revision: str = "main") -> dict[str, str]:
    """Path → sha256 of every file on the Hub, without the one that the Hub put there; {} if there is no repository."""
    if ("model", REPO) not in hub.repos:
        return {}
    return {path: sha256 for path, sha256 in hub.files(REPO, revision).items() if path != ".gitattributes"}


def change_tensors(layer: Path, change: Callable[[str, torch.Tensor], torch.Tensor | None]) -> Path:
    """Rewrites a layer's weights and statistics; what becomes None goes."""
    tensors = load_file(layer / "model.safetensors")
    changed = {name: change(name, tensor) for name, tensor in tensors.items()}
    kept = {name: tensor for name, tensor in changed.items() if tensor is not None}
    save_file(kept, layer / "model.safetensors", metadata={"format": "pt"})
    return layer


def commits(hub: HubServer, revision: str = "main") -> int:
    return sum(1 for _ in hub.repo(REPO).history(revision))


def changing(requests: list[str]) -> list[str]:
    """The requests that change what the Hub holds."""
    return [request for request in requests if re.match(r"PUT|DELETE|POST .*/(commit|branch|tag|create)", request)]


# What a publication is


@pytest.mark.slow
def test_a_run_becomes_a_repository_in_one_commit_and_loads_from_it(
    hub: HubServer, publisher: Publisher, run: Path, tmp_path: Path
) -> None:
    done = publisher.command(run, "--repo_id", REPO, "--author", "Ada Lovelace", "--message", "First set")
    assert done.returncode == 0, done.output
    layers = {f"layer_{layer}/{name}" for layer in (0, 1) for name in LAYER_FILES}
    drawn = ("all_layers_comparison", "derivatives_by_layer", "training_curves_overlaid_layers_0_1")
    figures = {f"figures/{name}.png" for name in drawn}
    root = {
        "README.md",
        "config.json",
        "configuration_bilinear_tc.py",
        "modeling_bilinear_tc.py",
        "recipe.yaml",
        "evaluation.json",
    }
    assert set(published(hub)) == layers | figures | root
    for path in layers | {"evaluation.json"}:
        assert published(hub)[path] == hash_file(run / path).sha256
    history = list(hub.repo(REPO).history("main"))
    assert [commit.title for commit in history] == ["First set", "initial commit"]

    assert f"{hub.url}/{REPO}" in done.stdout
    assert f'AutoModel.from_pretrained("{REPO}", subfolder="layer_0", trust_remote_code=True)' in done.stdout
    assert hub.token not in done.output
    card = ModelCard.load(copy_repository(hub, REPO, tmp_path / "clone") / "README.md")
    assert card.data.library_name == "transformers"
    assert "Ada Lovelace" in card.text

    loads = [{"subfolder": f"layer_{layer}"} for layer in (0, 1)]
    outputs = load_in_fresh_process(REPO, loads, hub.environment(tmp_path / "reader"), tmp_path / "outputs.pt")
    for layer, (_, _, output) in enumerate(outputs):
        assert torch.equal(output, saved_output(run, layer))


def test_each_file_of_the_run_is_read_once(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []

    def noted(function: Callable) -> Callable:
        return lambda path, *args, **kwargs: read.append(path) or function(path, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", noted(Path.read_text))
    monkeypatch.setattr(pq, "read_table", noted(pq.read_table))
    opened = Run(run)
    check_publishable(opened)
    build_repository(opened, run / "repository")
    of_layers = {run / f"layer_{layer}" / name for layer in (0, 1) for name in LAYER_FILES - {"model.safetensors"}}
    of_run = [
        path for path in read if run in path.parents and not any(p.name.endswith(".partial") for p in path.parents)
    ]
    assert sorted(of_run) == sorted({run / "recipe.yaml", run / "evaluation.json", *of_layers})


def test_what_an_earlier_publication_may_have_left_is_known_by_its_path(run: Path) -> None:
    folder = build_repository(Run(run), run / "repository", with_pt=True)
    assert all(LAYOUT.fullmatch(path) for path in list_files(folder))
    foreign = ("notes.txt", "READMEXmd", "layer_2/probe.txt", "figures/mine.png", "layer_x/config.json", "layer_0/a.pt")
    assert not any(LAYOUT.fullmatch(path) for path in foreign)


@pytest.mark.slow
def test_a_second_publication_uploads_nothing_and_says_so(hub: HubServer, publisher: Publisher, run: Path) -> None:
    assert publisher.command(run, "--repo_id", REPO).returncode == 0
    before = len(hub.requests)
    again = publisher.command(run, "--repo_id", REPO)
    assert again.returncode == 0, again.output
    assert "nothing was uploaded" in again.stdout
    assert changing(hub.requests[before:]) == []
    assert commits(hub) == 2


@pytest.mark.slow
def test_an_update_removes_what_no_longer_belongs_in_the_same_commit(
    hub: HubServer, publisher: Publisher, tmp_path: Path
) -> None:
    old = write_tiny_run(tmp_path / "old", layers=(0, 1, 2))
    assert publisher.command(old, "--repo_id", REPO).returncode == 0
    foreign = {"notes.txt": b"ours", "layer_2/probe.txt": b"ours too", "figures/mine.png": b"\0png"}
    hub.put(REPO, foreign)
    new = write_tiny_run(tmp_path / "new", layers=(0, 1), seed=5, evaluation=False)
    refused = publisher.command(new, "--repo_id", REPO)
    assert refused.stderr == (
        "error: publishing would remove layer_2 of tester/set: name another --repo_id, or add --overwrite\n"
    )
    done = publisher.command(new, "--repo_id", REPO, "--overwrite")
    assert done.returncode == 0, done.output
    assert "--overwrite: publishing will remove layer_2 of tester/set" in done.stdout
    assert set(published(hub)) - set(foreign) == set(local_hashes(new / "repository"))
    assert set(foreign) <= set(published(hub))
    assert commits(hub) == 4
    # layer_2's four files, evaluation.json, the figure of the derivatives, the curves of layers 0 to 2
    assert "7 removed" in done.stdout


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.slow
def test_save_dtype_casts_weights_and_leaves_statistics_and_the_run(
    hub: HubServer, publisher: Publisher, run: Path, tmp_path: Path, dtype: str
) -> None:
    # inputs far smaller than 1, as a base's first layers have them: at any other scale float16 overflows
    change_tensors(run / "layer_0", lambda name, tensor: tensor / 1e4 if name.startswith("input") else tensor)
    before = local_hashes(run)
    done = publisher.command(run, "--repo_id", REPO, "--save_dtype", dtype, "--private")
    assert done.returncode == 0, done.output
    assert hub.repo(REPO).private
    clone = copy_repository(hub, REPO, tmp_path / "clone")
    kept, sent = (load_file(folder / "layer_1" / "model.safetensors") for folder in (run, clone))
    for name, tensor in sent.items():
        is_statistic = name.endswith(("mean", "std"))
        assert tensor.dtype == (torch.float32 if is_statistic else getattr(torch, dtype))
        assert torch.equal(tensor, kept[name].to(tensor.dtype))
    assert dtype in (clone / "layer_1" / "config.json").read_text()
    assert f"before they were cast to {dtype}" in " ".join((clone / "README.md").read_text().split())
    assert not list(clone.glob("layer_*/*.py"))
    assert {path: sha256 for path, sha256 in local_hashes(run).items() if "repository/" not in path} == before


@pytest.mark.slow
def test_weights_that_have_the_type_already_are_not_cast(run: Path) -> None:
    cast = build_repository(Run(run), run / "cast", save_dtype="bfloat16")
    assert "were cast" in (cast / "README.md").read_text()
    for source, dtype in ((run, "float32"), (run, None), (cast, "bfloat16")):
        same = build_repository(Run(source), run / "same", save_dtype=dtype)
        assert "were cast" not in (same / "README.md").read_text()
        for path in ("layer_0/model.safetensors", "layer_1/config.json"):
            assert hash_file(same / path).sha256 == hash_file(source / path).sha256
    back = build_repository(Run(cast), run / "back", save_dtype="float32")
    assert "cast to float32" in " ".join((back / "README.md").read_text().split())
    assert load_file(back / "layer_0" / "model.safetensors")["head.weight"].dtype == torch.float32


def test_settings_are_published_without_where_the_run_lies(run: Path) -> None:
    place = "/home/somebody/runs/mine"
    for path in (run / "recipe.yaml", run / "layer_1" / "config.yaml"):
        path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"output_dir": place}, sort_keys=False))
    before = local_hashes(run)
    folder = build_repository(Run(run), run / "repository", with_pt=True)
    for path in ("recipe.yaml", "layer_0/config.yaml", "layer_1/config.yaml"):
        settings = yaml.safe_load((run / path).read_text())
        for name in ("output_dir", "from_run"):
            settings.pop(name, None)
        assert list(yaml.safe_load((folder / path).read_text()).items()) == list(settings.items())
    for path in folder.rglob("*"):
        assert path.is_dir() or place.encode() not in path.read_bytes(), path
    assert {path: sha for path, sha in local_hashes(run).items() if not path.startswith("repository/")} == before


def test_a_cast_that_overflows_is_refused_before_anything_is_sent(
    hub: HubServer, publisher: Publisher, run: Path
) -> None:
    change_tensors(run / "layer_1", lambda name, tensor: tensor * 1e6 if name == "head.weight" else tensor)
    done = publisher.command(run, "--repo_id", REPO, "--save_dtype", "float16")
    assert done.returncode == 1
    assert re.fullmatch(r"error: head\.weight of layer_1 .*float16.*65504: .*--save_dtype\n", done.stderr), done.stderr
    assert changing(hub.requests) == []


def test_outputs_that_are_nan_in_both_are_the_same_and_others_are_not(run: Path) -> None:
    model = BilinearTC.from_pretrained(run / "layer_0")
    model.output_mean[0] = float("nan")
    other = copy.deepcopy(model)
    assert same_outputs(model, other)
    other.output_mean[1] += 1
    assert not same_outputs(model, other)


@pytest.mark.slow
def test_with_pt_adds_the_earlier_layout_and_the_next_publication_without_it_removes_it(
    hub: HubServer, publisher: Publisher, run: Path
) -> None:
    done = publisher.command(run, "--repo_id", REPO, "--with_pt")
    assert done.returncode == 0, done.output
    checkpoints = {f"layer_{layer}/transcoder_weights_l{layer}_bilinear_muon_5b.pt" for layer in (0, 1)}
    assert checkpoints <= set(published(hub))
    assert "nothing was uploaded" in publisher.command(run, "--repo_id", REPO, "--with_pt").stdout
    assert publisher.command(run, "--repo_id", REPO).returncode == 0
    assert not checkpoints & set(published(hub))


@pytest.mark.slow
def test_a_branch_is_made_and_main_left_alone(hub: HubServer, publisher: Publisher, run: Path) -> None:
    hub.put(REPO, {"README.md": b"---\nlicense: mit\n---\n"})
    main = published(hub)
    done = publisher.command(run, "--repo_id", REPO, "--revision", "next/try", "--tag", "v2")
    assert done.returncode == 0, done.output
    assert published(hub) == main
    assert published(hub, "next/try") == published(hub, "v2") == local_hashes(run / "repository")
    assert 'revision="v2"' in done.stdout
    assert f"{hub.url}/{REPO}/tree/next%2Ftry" in done.stdout


@pytest.mark.slow
def test_a_pull_request_is_opened_once_and_main_left_alone(hub: HubServer, publisher: Publisher, run: Path) -> None:
    hub.put(REPO, {"notes.txt": b"ours"})
    first = publisher.command(run, "--repo_id", REPO, "--create_pr")
    assert first.returncode == 0, first.output
    assert set(published(hub)) == {"notes.txt"}
    assert published(hub, "refs/pr/1") == {**local_hashes(run / "repository"), **published(hub)}
    assert f"{hub.url}/{REPO}/discussions/1" in first.stdout
    again = publisher.command(run, "--repo_id", REPO, "--create_pr")
    assert "nothing was uploaded" in again.stdout
    assert f"{hub.url}/{REPO}/discussions/1" in again.stdout
    assert "refs/pr/2" not in hub.repo(REPO).refs
    hub.repo(REPO).closed.add("refs/pr/1")
    anew = publisher.command(run, "--repo_id", REPO, "--create_pr")
    assert f"{hub.url}/{REPO}/discussions/2" in anew.stdout, anew.output


@pytest.mark.slow
def test_a_tag_in_use_is_refused_before_anything_is_sent(
    hub: HubServer, publisher: Publisher, run: Path, tmp_path: Path
) -> None:
    assert publisher.command(run, "--repo_id", REPO, "--tag", "v1").returncode == 0
    assert publisher.command(run, "--repo_id", REPO, "--tag", "v1").returncode == 0
    other = write_tiny_run(tmp_path / "other", seed=9)
    before = len(hub.requests)
    refused = publisher.command(other, "--repo_id", REPO, "--tag", "v1")
    assert refused.returncode == 1
    assert "tag v1" in refused.stderr
    assert changing(hub.requests[before:]) == []


def test_a_dry_run_writes_the_folder_and_sends_nothing(hub: HubServer, publisher: Publisher, run: Path) -> None:
    foreign = {"layer_7/model.safetensors": b"old", "layer_7/notes.txt": b"ours", "recipe.yaml": b"old: true\n"}
    hub.put(REPO, foreign)
    done = Publisher(publisher.server, hub, publisher.home, token="").command(run, "--repo_id", REPO, "--dry_run")
    assert done.returncode == 0, done.output
    assert changing(hub.requests) == []
    lines = {line.split()[-1]: line for line in done.stdout.splitlines() if line[:2] in ("+ ", "~ ", "= ", "- ")}
    assert set(lines) == set(local_hashes(run / "repository")) | {"layer_7/model.safetensors"}
    assert lines["layer_7/model.safetensors"].startswith("-")
    assert lines["recipe.yaml"].startswith("~")
    assert lines["layer_1/history.parquet"].startswith("+")
    size = (run / "layer_1" / "history.parquet").stat().st_size
    assert f"{size / 1000:.1f} kB" in lines["layer_1/history.parquet"]


def listed(output: str) -> set[str]:
    """The paths that a dry run lists without a mark, each after its size."""
    return set(re.findall(r"^ +[\d.]+ k?B  (\S+)$", output, flags=re.MULTILINE))


@pytest.mark.slow
def test_a_dry_run_offline_lists_the_files_and_says_why_they_are_not_compared(
    hub: HubServer, publisher: Publisher, run: Path
) -> None:
    offline = Publisher(publisher.server, hub, publisher.home, HF_HUB_OFFLINE="1")
    started = time.monotonic()
    done = offline.command(run, "--repo_id", REPO, "--dry_run")
    assert done.returncode == 0, done.output
    assert listed(done.stdout) == set(local_hashes(run / "repository"))
    assert re.search(r"nothing was sent; the files were not compared .*HF_HUB_OFFLINE.*: unset it$", done.stdout)
    refused = offline.command(run, "--repo_id", REPO)
    assert refused.returncode == 1
    assert re.fullmatch(r"error: .*HF_HUB_OFFLINE.*: unset it\n", refused.stderr), refused.stderr
    assert time.monotonic() - started < 15  # no pauses of 1, 2, 4 and 8 seconds
    assert hub.requests == []


@pytest.mark.parametrize("fault", [503, "drop"])
def test_a_dry_run_lists_the_files_where_the_hub_gives_no_answer(
    hub: HubServer, run: Path, capsys: pytest.CaptureFixture[str], fault: Fault
) -> None:
    hub.fail(1, fault, times=1000)
    repository = HubRepository(REPO, attempts=2, first_wait=0)
    repository.api = HfApi(endpoint=hub.url, token=hub.token)
    show_plan(repository, list_files(run))
    printed = capsys.readouterr().out
    assert listed(printed) == set(local_hashes(run))
    assert re.search(r"the files were not compared with tester/set on the Hub: the .* failed 2 times", printed)
    assert len(hub.requests) == 2


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (PermissionError("token expired"), "may not write to tester/set (403)"),
        (
            ConnectionError("Request error: HTTP status client error (403 Forbidden)"),
            "may not write to tester/set (403)",
        ),
        (ConnectionError("Request error: HTTP status client error (401 Unauthorized)"), "accept the token (401)"),
        (ConnectionError("Request error: HTTP status server error (500)"), "failed 5 times (Request error"),
        (RuntimeError("CAS service error"), "failed 5 times (CAS service error): run the command again"),
    ],
)
def test_what_xet_storage_says_is_explained_like_what_the_hub_says(error: Exception, sentence: str) -> None:
    assert sentence in HubRepository(REPO).explain(XetError(error))


@pytest.mark.slow
def test_a_failure_of_xet_storage_is_retried_and_a_refusal_is_not(
    fork_server: ForkServer, hub: HubServer, run: Path, tmp_path: Path
) -> None:
    """What hf_xet sends to the storage host is answered by 404."""
    pytest.importorskip("hf_xet")
    build_repository(Run(run), run / "repository", repo_id=REPO)
    hub.create(REPO)
    publisher = Publisher(fork_server, hub, tmp_path / "home", HF_HUB_DISABLE_XET="0")
    settings = Publication(repo_id=REPO)
    failed = publisher.send(run, settings)
    assert failed.returncode == 1
    sentence = failed.stderr.splitlines()[-1]  # below the progress bars
    assert re.fullmatch(r"error: the connection to the Hub failed 5 times.*run the command again.*", sentence)

    before = len(hub.requests)
    tokens = f"GET /api/models/{REPO}/xet-write-token/main"

    hub.fail(1, lambda: 403 if hub.requests[-1] == tokens else None, times=1000)
    refused = publisher.send(run, settings)
    assert refused.returncode == 1
    sentence = refused.stderr.splitlines()[-1]
    assert re.fullmatch(r"error: the token may not write to tester/set \(403\): .*", sentence), refused.stderr
    assert hub.requests[before:].count(tokens) == 1
    assert published(hub) == {}


# What is refused


def test_everything_wrong_with_a_run_is_said_at_once(hub: HubServer, publisher: Publisher, tmp_path: Path) -> None:
    run = write_tiny_run(tmp_path / "run", layers=range(9))
    weights = {layer: run / f"layer_{layer}" / "model.safetensors" for layer in range(9)}
    tensors = {layer: load_file(path) for layer, path in weights.items()}
    tensors[0]["left.weight"][2, 1] = float("nan")
    tensors[1]["head.weight"] = torch.zeros(3, 3)
    del tensors[2]["right.bias"]
    tensors[3]["input_std"][0] = 0
    for layer in range(4):
        save_file(tensors[layer], weights[layer], metadata={"format": "pt"})
    (run / "layer_4" / "history.parquet").write_bytes(b"PAR1 not really")
    history = pq.read_table(run / "layer_5" / "history.parquet")
    pq.write_table(history.drop_columns("fvu"), run / "layer_5" / "history.parquet")
    weights[6].write_bytes(weights[6].read_bytes()[:-10])
    for name in ("layer_7", "layer_8"):
        config = json.loads((run / name / "config.json").read_text())
        config.update(n_inputs=12) if name == "layer_7" else config.update(layer_index=3)
        (run / name / "config.json").write_text(json.dumps(config))
    (run / "layer_8" / "config.yaml").unlink()
    evaluation = json.loads((run / "evaluation.json").read_text())
    evaluation["layers"]["6"]["kl"] = float("nan")
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    (run / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "layers": "0-9"}))

    done = publisher.command(run, "--repo_id", REPO)
    assert done.returncode == 1
    problems = done.stderr.removeprefix("error: ").splitlines()[1:]
    expected = [
        ("layer_0", "left.weight", "not finite"),
        ("layer_1", "head.weight", "[3, 3]", "[8, 16]"),
        ("layer_2", "right.bias"),
        ("layer_3", "input_std"),
        ("layer_4", "history.parquet"),
        ("layer_5", "history.parquet", "fvu"),
        ("layer_6",),
        ("layer_7", "left.weight", "[16, 12]"),
        ("layer_8", "layer 3"),
        ("layer_8/config.yaml", "missing"),
        ("layer_9", "missing"),
        ("evaluation.json", "kl", "6"),
        ("n_inputs", "12 in layer_7"),
    ]
    for words in expected:
        assert any(all(word in problem for word in words) for problem in problems), (words, done.stderr)
    assert hub.requests == []
    assert not list(run.glob("*repository*"))


def problems_of(run: Path) -> list[str]:
    with pytest.raises(UnfitRun) as caught:
        check_publishable(Run(run))
    return str(caught.value).split("\n  ")[1:]


def test_layers_of_another_form_width_or_bias_are_named(tmp_path: Path) -> None:
    run = write_tiny_run(tmp_path / "run", layers=(0, 1, 2))
    shutil.copytree(write_tiny_run(tmp_path / "other", layers=(1,), n_hidden=24) / "layer_1", run / "layer_1", **OVER)
    summed = write_tiny_run(tmp_path / "summed", layers=(2,), form="input_sum")
    shutil.copytree(summed / "layer_2", run / "layer_2", **OVER)
    assert problems_of(run) == [
        "form differs between layers: bilinear in layer_0, layer_1; input_sum in layer_2",
        "n_hidden differs between layers: 16 in layer_0, layer_2; 24 in layer_1",
    ]
    without = change_tensors(run / "layer_0", lambda name, tensor: None if name.endswith("bias") else tensor)
    config = json.loads((without / "config.json").read_text()) | {"bias": False}
    (without / "config.json").write_text(json.dumps(config))
    assert "bias differs between layers: False in layer_0; True in layer_1, layer_2" in problems_of(run)


def test_a_run_without_scores_is_refused_before_the_folder_is_begun(tmp_path: Path) -> None:
    run = write_tiny_run(tmp_path / "run", steps=0, evaluation=False)
    assert problems_of(run) == [
        f"layer_{layer} has neither held-out scores nor a training history: run train/evaluate.py first"
        for layer in (0, 1)
    ]
    check_publishable(Run(write_tiny_run(tmp_path / "evaluated", steps=0)))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda _: [1, 2], "expected scores by name, got list"),
        (lambda e: e["all_layers"].update(kl=math.nan), "kl of all_layers is not a finite number"),
        (lambda e: e["base"].update(ce=math.inf), "ce of base is not a finite number"),
        (lambda e: e["mean"].update(fvu=math.nan), "fvu of mean is not a finite number"),
        (lambda e: e["layers"]["1"].update(fvu="0.1", kl=None), "fvu, kl of layer 1 are not finite numbers"),
        (lambda e: e["layers"]["0"].pop("fvu"), "layer 0 has no fvu"),
        (lambda e: e["layers"]["0"].update(fvu={}), "fvu of layer 0 is not a finite number"),
        (lambda e: e["layers"]["0"].update(interchange=1), "interchange of layer 0 must hold numbers by name"),
        (lambda e: e["layers"]["0"]["interchange"].update(x={}), "x of interchange of layer 0 is not a finite number"),
        (lambda e: e["layers"]["0"]["worst_channel"].pop("index"), "worst_channel of layer 0 has no index"),
        (lambda e: e["layers"].update({"0": 3}), "layer 0 must hold scores by name, got int"),
        (lambda e: e["layers"].update(x=dict(e["layers"]["0"])), "layers must be named by their numbers, got 'x'"),
        (lambda e: e.update(layers=[]), "layers must hold scores by layer, got list"),
        (lambda e: e.update(all_layers=None), "all_layers must hold scores by name, got NoneType"),
        (lambda e: e["continuations"].pop("tokens"), "continuations has no tokens"),
        (lambda e: e["continuations"].update(same_mean="x"), "same_mean of continuations is not a finite number"),
        (lambda e: e["continuations"].update(prompt=["x"]), "prompt of continuations must be a text"),
        (lambda e: e.update(continuations=3), "continuations must hold scores by name, got int"),
        (lambda e: e.update(tokens="many"), "tokens must be a number, got 'many'"),
        (lambda e: e.update(dataset=["a"]), "dataset must be a name, got ['a']"),
    ],
)
def test_a_damaged_evaluation_is_a_line_of_the_list(run: Path, change: Callable, problem: str) -> None:
    evaluation = json.loads((run / "evaluation.json").read_text())
    changed = change(evaluation)
    (run / "evaluation.json").write_text(json.dumps(changed if isinstance(changed, list) else evaluation))
    assert problems_of(run) == [f"{run / 'evaluation.json'}: {problem}; run train/evaluate.py again"]
    with pytest.raises(ValueError, match=re.escape(problem)):  # the card and the figures say the same
        _ = Run(run).scores


@pytest.mark.parametrize(
    ("file", "content", "problem"),
    [
        ("config.yaml", "fit: null\n", "layer_0/config.yaml: fit must hold a whole number of steps, got None"),
        (
            "config.yaml",
            "fit: {steps: many}\n",
            "layer_0/config.yaml: fit must hold a whole number of steps, got 'many'",
        ),
        ("config.yaml", "- 1\n", "config.yaml must hold one setting a line, got a list"),
        ("config.json", "[]", "layer_0 does not load"),
        ("config.json", '{"model_type": "bilinear_tc", "n_inputs": "x"}', "layer_0 does not load"),
        ("model.safetensors", "", "layer_0 does not load"),
    ],
)
def test_a_damaged_layer_is_a_line_of_the_list(run: Path, file: str, content: str, problem: str) -> None:
    (run / "layer_0" / file).write_text(content)
    assert any(problem in line for line in problems_of(run))


@pytest.mark.parametrize(("values", "words"), [(["low"] * 5, "expected numbers"), ([None] * 5, "not finite, in fvu")])
def test_a_history_without_numbers_is_a_line_of_the_list(run: Path, values: list, words: str) -> None:
    path = run / "layer_0" / "history.parquet"
    history = pq.read_table(path).drop_columns("fvu")
    kind = pa.string() if values[0] else pa.float64()
    pq.write_table(history.append_column("fvu", pa.array(values, kind)), path)
    (problem,) = problems_of(run)
    assert words in problem


@pytest.mark.slow
def test_a_partial_run_needs_to_be_allowed(hub: HubServer, publisher: Publisher, run: Path) -> None:
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    (run / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "layers": "0-2", "max_steps": 50}))
    with pytest.raises(UnfitRun, match=r"layer_2 is missing(.|\n)*layer_0 was fitted for 5 of 50 steps"):
        check_publishable(Run(run))
    done = publisher.command(run, "--repo_id", REPO, "--allow_partial")
    assert done.returncode == 0, done.output
    assert {path.split("/")[0] for path in published(hub) if path.startswith("layer_")} == {"layer_0", "layer_1"}


def test_a_base_that_cannot_be_asked_for_its_layers_is_said(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = yaml.safe_load((run / "recipe.yaml").read_text()) | {"layers": None}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert any("layer_5 is missing" in problem for problem in problems_of(run))  # train/quickstart has six
    assert "could not be checked" not in capsys.readouterr().out
    (run / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "base": "/no/such/base"}))
    check_publishable(Run(run))
    assert "how many layers /no/such/base has could not be checked" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "token", "words"),
    [
        (["--repo_id", REPO], "", ["no Hub token", "hf auth login"]),
        (["--repo_id", REPO], "hf_madeUpToken", ["401", "hf auth login"]),
        (["--repo_id", REPO], "hf_loopbackReadToken", ["403", "write access"]),
        (["--repo_id", "other/set"], "hf_loopbackWriteToken", ["403", "other", "--repo_id"]),
        (["--repo_id", REPO, "--revision", "refs/pr/4"], "hf_loopbackWriteToken", ["refs/pr/4", "--revision"]),
        (["--repo_id", "just-a-name"], "hf_loopbackWriteToken", ["you/name", "just-a-name"]),
        ([], "hf_loopbackWriteToken", ["--repo_id", "you/name"]),
        (["--repo_id", "tester/public", "--private"], "hf_loopbackWriteToken", ["public", "--private"]),
        (["--repo_id", REPO, "--create_pr", "--tag", "v1"], "hf_loopbackWriteToken", ["--tag", "--create_pr"]),
    ],
)
@pytest.mark.slow
def test_a_refusal_is_one_sentence_with_the_remedy(
    publisher: Publisher, hub: HubServer, run: Path, flags: list[str], token: str, words: list[str]
) -> None:
    hub.create("tester/public")
    done = Publisher(publisher.server, hub, publisher.home, token=token).command(run, *flags)
    assert done.returncode == 1
    sentence = done.stderr.strip()
    assert sentence.startswith("error: ")
    assert "\n" not in sentence
    assert all(word in sentence for word in words), sentence
    assert not token or token not in done.output


@pytest.mark.slow
def test_a_commit_of_someone_else_meanwhile_is_not_overwritten(hub: HubServer, publisher: Publisher, run: Path) -> None:
    hub.put(REPO, {"notes.txt": b"ours"})

    def someone_commits() -> None:
        if hub.requests[-1] == f"POST /api/models/{REPO}/commit/main":
            hub.put(REPO, {"notes.txt": b"changed"})

    hub.fail(1, someone_commits, times=1000)
    done = publisher.command(run, "--repo_id", REPO)
    assert done.returncode == 1
    assert "412" in done.stderr
    assert "run the command again" in done.stderr
    assert set(published(hub)) == {"notes.txt"}


# What goes wrong on the way


class Update:
    """The update of an old set on the Hub by a new one, to be disturbed; each case has a Hub of its own."""

    def __init__(self, folder: Path, server: ForkServer) -> None:
        self.folder, self.server = folder, server
        self.old = write_tiny_run(folder / "old", layers=(0, 1), steps=3, seed=1)
        self.new = write_tiny_run(folder / "new", layers=(0,), steps=3, seed=2)
        for run in (self.old, self.new):
            build_repository(Run(run), run / "repository", repo_id=REPO)
        self.sets = [local_hashes(run / "repository") for run in (self.old, self.new)]
        self.settings = Publication(repo_id=REPO, overwrite=True)
        self.commits = 3  # the Hub's own, the old set, the new one

    def hub(self, name: str) -> HubServer:
        hub = HubServer(self.folder / name)
        files = {path: file.path for path, file in list_files(self.old / "repository").items()}
        hub.put(REPO, files)
        return hub

    def publisher(self, hub: HubServer, home: str) -> Publisher:
        return Publisher(self.server, hub, self.folder / home)

    @cached_property
    def requests(self) -> list[str]:
        """What an undisturbed publication asks the Hub."""
        with self.hub("reference") as hub:
            done = self.publisher(hub, "reference-home").send(self.new, self.settings)
            assert done.returncode == 0, done.output
            assert published(hub) == self.sets[1]
            return hub.requests

    @property
    def own_requests(self) -> list[str]:
        """Those that are worth a disturbance."""
        return self.requests


class FirstPublication(Update):
    """The same on a Hub that has no such repository yet."""

    def __init__(self, folder: Path, server: ForkServer) -> None:
        super().__init__(folder, server)
        self.sets[0] = {}
        self.commits = 2

    def hub(self, name: str) -> HubServer:
        return HubServer(self.folder / name)

    @property
    def own_requests(self) -> list[str]:
        """Up to the commit, from which on it asks what an update asks."""
        return self.requests[: 1 + self.requests.index(f"POST /api/models/{REPO}/commit/main")]


@pytest.fixture(scope="module")
def update(fork_server: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Update:
    return Update(tmp_path_factory.mktemp("update"), fork_server)


@pytest.fixture(scope="module", params=[Update, FirstPublication])
def publication(
    request: pytest.FixtureRequest, fork_server: ForkServer, tmp_path_factory: pytest.TempPathFactory
) -> Update:
    return request.param(tmp_path_factory.mktemp(request.param.__name__), fork_server)


def at_requests(publication: Update, case: Callable[[int], None], numbers: list[int]) -> None:
    """Runs a case for each of the publication's requests, by number, several at a time: they mostly wait.

    The order of uploads is not always the same, but where they begin and end is.
    """
    assert publication.requests[0] == "GET /api/whoami-v2"
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(case, numbers))


def writing(publication: Update) -> list[int]:
    """The numbers of the requests that do not only read."""
    return [n for n, request in enumerate(publication.own_requests, 1) if not request.startswith(("GET", "HEAD"))]


@pytest.mark.parametrize("faults", [(500, 503), ("drop",), ("lost",)])
@pytest.mark.slow
def test_a_failure_at_any_request_is_overcome(publication: Update, faults: tuple[Fault, ...]) -> None:
    def case(nth: int) -> None:
        fault = faults[nth % len(faults)]
        with publication.hub(f"{fault}-{nth}") as hub:
            hub.fail(nth, fault)
            done = publication.publisher(hub, f"{fault}-{nth}-home").send(publication.new, publication.settings)
            assert done.returncode == 0, (nth, hub.requests[nth - 1], done.output)
            assert published(hub) == publication.sets[1]
            assert commits(hub) == publication.commits, (nth, hub.requests[nth - 1])

    # for what only reads, an answer lost on the way back is the same as a request lost on the way there
    every = list(range(1, len(publication.own_requests) + 1))
    at_requests(publication, case, writing(publication) if faults == ("lost",) else every)


@pytest.mark.slow
def test_the_pause_that_the_hub_asks_for_is_kept_and_shown(update: Update) -> None:
    """At the first request, at the commit and while reading back, where the client, too, tries again, once at once."""
    commit = 1 + update.requests.index(f"POST /api/models/{REPO}/commit/main")
    last = len(update.requests)

    def case(nth: int) -> None:
        with update.hub(f"limit-{nth}") as hub:
            arrivals: list[float] = []

            def refuse() -> int:
                arrivals.append(time.monotonic())
                return 429

            hub.fail(nth, refuse, times=2)
            hub.fail(nth + 2, lambda: arrivals.append(time.monotonic()))
            done = update.publisher(hub, f"limit-{nth}-home").send(update.new, update.settings)
            assert done.returncode == 0, (nth, done.output)
            assert "Traceback" not in done.output
            assert arrivals[2] - arrivals[0] >= 0.9, (nth, hub.requests[nth - 1])
            assert re.search(r"no more requests for 1 seconds \(429\)|Rate limited\. Waiting", done.output), done.output
            assert published(hub) == update.sets[1]

    at_requests(update, case, [1, commit, commit + 2, last - 2, last - 1, last])


@pytest.mark.slow
def test_a_kill_in_any_state_of_the_hub_leaves_a_whole_set_and_the_next_run_completes_it(publication: Update) -> None:
    def case(nth: int) -> None:
        with publication.hub(f"kill-{nth}") as hub:
            publisher = publication.publisher(hub, f"kill-{nth}-home")
            started = threading.Event()

            def kill() -> str:
                started.wait()
                process.kill()
                return "drop"

            hub.fail(nth, kill)
            process = publisher.start_sending(publication.new, publication.settings)
            started.set()
            killed = process.wait()
            assert killed.returncode == -signal.SIGKILL, (nth, hub.requests, killed.output)
            assert published(hub) in publication.sets
            again = publisher.send(publication.new, publication.settings)
            assert again.returncode == 0, (nth, hub.requests, again.output)
            assert published(hub) == publication.sets[1]
            assert commits(hub) == publication.commits, (nth, hub.requests)

    # a process that is killed takes all that it knows with it: what differs is only what the Hub has been told by then
    at_requests(publication, case, [1, *(n + 1 for n in writing(publication))])


@pytest.mark.slow
def test_lost_answers_while_making_a_repository_a_branch_and_a_tag_are_overcome(update: Update) -> None:
    with HubServer(update.folder / "making") as hub:
        lost: set[str] = set()

        def lose_once() -> str | None:
            request = hub.requests[-1]
            is_making = re.search(r"POST .*/(create|branch|tag)\b", request) and request not in lost
            lost.update([request] if is_making else [])
            return "lost" if is_making else None

        hub.fail(1, lose_once, times=1000)
        settings = replace(update.settings, revision="next", tag="v1")
        done = update.publisher(hub, "making-home").send(update.new, settings)
        assert done.returncode == 0, done.output
        assert len(lost) == 3
        assert published(hub, "next") == published(hub, "v1") == update.sets[1]
        assert commits(hub, "next") == 2
        assert published(hub) == {}


@pytest.mark.slow
def test_a_pull_request_whose_answer_was_lost_is_found_and_not_opened_twice(update: Update) -> None:
    settings = replace(update.settings, create_pr=True)
    with update.hub("lost-pr") as hub:

        def lose_commit() -> str | None:
            return "lost" if "/commit/" in hub.requests[-1] else None

        hub.fail(1, lose_commit, times=1000)
        done = update.publisher(hub, "lost-pr-home").send(update.new, settings)
        assert done.returncode == 0, done.output
        assert f"{hub.url}/{REPO}/discussions/1" in done.stdout
        assert [ref for ref in hub.repo(REPO).refs if ref.startswith("refs/pr/")] == ["refs/pr/1"]
        assert published(hub) == update.sets[0]


@pytest.mark.parametrize("fault", [503, "drop"])
@pytest.mark.slow
def test_a_hub_that_stays_down_ends_the_command_in_one_sentence(update: Update, fault: Fault) -> None:
    with update.hub(f"down-{fault}") as hub:
        hub.fail(1, fault, times=1000)
        done = update.publisher(hub, f"down-{fault}-home").send(update.new, update.settings)
        assert done.returncode == 1
        assert re.fullmatch(r"error: the .*failed 5 times.*run the command again.*\n", done.stderr), done.stderr
        assert len(hub.requests) == 5
        assert published(hub) == update.sets[0]
        hub.heal()
        again = update.publisher(hub, f"up-{fault}-home").send(update.new, update.settings)
        assert again.returncode == 0, again.output
        assert published(hub) == update.sets[1]
