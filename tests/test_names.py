"""What a publication calls the base and the text, and what it takes from the base's own card."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from hub_server import HubServer
from huggingface_hub import ModelCard
from publishing import Publisher
from test_model_card import change_settings
from tiny_run import ROOT, write_tiny_run

from bilinear_tc.train.errors import UserError
from bilinear_tc.train.run import Run
from bilinear_tc.upload.base_card import BaseCard, read_base_card
from bilinear_tc.upload.names import published_base, split_name, text_name
from bilinear_tc.upload.publish import Publication
from bilinear_tc.upload.repository import UnfitRun, build_repository, check_publishable


def local_run(tmp_path: Path, dataset: str) -> Path:
    """A run that was fitted and measured with everything in folders of this machine."""
    base = tmp_path / "secret" / "models" / "my-base"
    base.mkdir(parents=True)
    (tmp_path / "secret" / "texts").mkdir()
    places = {"dataset": str(tmp_path / "secret" / dataset), "eval_split": str(tmp_path / "secret" / "held_out.jsonl")}
    run = change_settings(write_tiny_run(tmp_path / "run"), base=str(base), output_dir=str(tmp_path / "run"), **places)
    evaluation = json.loads((run / "evaluation.json").read_text())
    measured = {"dataset": places["dataset"], "split": places["eval_split"], "base": {"model": str(base), "ce": 3.0}}
    (run / "evaluation.json").write_text(json.dumps(evaluation | measured))
    return run


@pytest.mark.parametrize("save_dtype", [None, "bfloat16"])
@pytest.mark.parametrize(("dataset", "name"), [("texts/*.jsonl", "*.jsonl"), ("texts", "texts/")])
@pytest.mark.slow
def test_no_path_of_this_machine_is_in_any_published_file(
    tmp_path: Path, dataset: str, name: str, save_dtype: str | None
) -> None:
    run = local_run(tmp_path, dataset)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    options = {"repo_id": "you/set", "base_model": "owner/base-7b", "save_dtype": save_dtype, "with_pt": True}
    folder = build_repository(Run(run), tmp_path / "set", **options)
    for path in folder.rglob("*"):
        for leak in (tmp_path.name, "secret", "my-base", str(Path.home()), str(ROOT)):
            assert path.is_dir() or leak.encode() not in path.read_bytes(), (path, leak)
    assert {path: path.read_bytes() for path in before} == before

    for layer in (0, 1):
        assert json.loads((folder / f"layer_{layer}" / "config.json").read_text())["base_model"] == "owner/base-7b"
        described = yaml.safe_load((folder / f"layer_{layer}" / "config.yaml").read_text())
        assert (described["base_model"], described["dataset"]) == ("owner/base-7b", name)
    checkpoint = torch.load(next((folder / "layer_0").glob("*.pt")))
    assert checkpoint["config"]["base_model"] == "owner/base-7b"
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    assert (recipe["base"], recipe["dataset"], recipe["eval_split"]) == ("owner/base-7b", name, "held_out.jsonl")
    evaluation = json.loads((folder / "evaluation.json").read_text())
    assert (evaluation["base"], evaluation["split"]) == ({"model": "owner/base-7b", "ce": 3.0}, "held_out.jsonl")
    card = ModelCard.load(folder / "README.md")
    assert (card.data.base_model, card.data.datasets, "base" in card.data.tags) == ("owner/base-7b", None, True)
    assert 'from_pretrained("owner/base-7b")' in card.text
    check_publishable(Run(folder))  # it is a run that names no folder any more


def test_a_base_in_a_folder_is_refused_in_a_sentence_that_names_the_flag(
    hub: HubServer, publisher: Publisher, tmp_path: Path
) -> None:
    run = local_run(tmp_path, "texts")
    for flags in ((), ("--dry_run",)):
        refused = publisher.command(run, "--repo_id", "tester/set", *flags)
        assert refused.returncode == 1
        *_, line = refused.stderr.splitlines()
        assert line.endswith("my-base is a folder, which readers do not have: name its Hub id with --base_model")
        assert "Traceback" not in refused.stderr
    assert not (run / "repository").exists()
    assert ("model", "tester/set") not in hub.repos
    done = publisher.command(run, "--repo_id", "tester/set", "--dry_run", "--base_model", "owner/base")
    assert done.returncode == 0, done.output


def test_the_base_that_ships_with_the_package_keeps_its_name_from_any_path(tmp_path: Path) -> None:
    run = write_tiny_run(tmp_path / "run")
    assert published_base(Run(run), None) == "train/quickstart"
    change_settings(run, base=str(ROOT / "train" / "quickstart"))
    assert published_base(Run(run), None) == "train/quickstart"
    assert published_base(Run(run), "owner/base") == "owner/base"
    card = (build_repository(Run(run), tmp_path / "set", repo_id="you/set") / "README.md").read_text()
    assert ModelCard(card).data.base_model is None
    assert 'from_pretrained("train/quickstart")' in card
    assert "huggingface.co/train/quickstart" not in card


def test_a_folder_that_reads_like_a_hub_id_is_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = change_settings(write_tiny_run(tmp_path / "run"), base="models/tiny", dataset="texts/pile")
    assert published_base(Run(run), None) == "models/tiny"
    assert text_name("texts/pile") == "texts/pile"
    for folder in ("models/tiny", "texts/pile"):
        (tmp_path / folder).mkdir(parents=True)
    with pytest.raises(UnfitRun, match="models/tiny is a folder"):
        check_publishable(Run(run))
    (run / "evaluation.json").unlink()
    card = (build_repository(Run(run), tmp_path / "set", base_model="owner/tiny") / "README.md").read_text()
    assert ModelCard(card).data.datasets is None
    assert "`pile` (local files)" in card
    assert "huggingface.co/datasets" not in card


@pytest.mark.parametrize(
    ("split", "dataset", "name"),
    [
        ("validation", "python-stdlib", "validation"),
        ("data/val.jsonl.zst", "monology/pile-uncopyrighted", "data/val.jsonl.zst"),
        ("/home/me/val.jsonl", "monology/pile-uncopyrighted", "val.jsonl"),
        (r"C:\texts\val.jsonl", "monology/pile-uncopyrighted", "val.jsonl"),
        ("sub/val.jsonl", "/data/texts", "val.jsonl"),
        ("train[:1%]", "a/b", "train[:1%]"),
        ("/home/me/val.jsonl", None, "val.jsonl"),
    ],
)
def test_a_split_keeps_its_place_in_a_data_set_of_the_hub_only(split: str, dataset: str, name: str) -> None:
    assert split_name(split, dataset) == name


def test_several_files_keep_their_names() -> None:
    assert text_name("/data/a.jsonl,/data/b.txt") == "a.jsonl,b.txt"
    assert text_name("monology/pile-uncopyrighted") == "monology/pile-uncopyrighted"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"base_model": "/me/base"}, "--base_model must be a Hub id that reads like owner/name, got '/me/base'"),
        ({"base_model": "base"}, "--base_model must be a Hub id"),
        ({"license": "Apache 2.0"}, "--license must read as the Hub spells it, such as apache-2.0, got 'Apache 2.0'"),
    ],
)
def test_flags_that_cannot_be_are_refused(flags: dict[str, str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Publication(repo_id="you/set", **flags)


def card_of_license(license: str) -> str:
    return f"---\nlicense: {license}\nlicense_link: https://example.org/L\n---\n\n# A base\n"


def test_what_a_base_says_is_read_from_its_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, base = local_run(tmp_path, "texts"), tmp_path / "secret" / "models" / "my-base"
    (base / "config.json").write_text('{"model_type": "llama"}')
    assert read_base_card(Run(run), "owner/base", offline=True) == BaseCard({}, "llama")  # it has no card
    assert "what owner/base says of itself could not all be read" in capsys.readouterr().out
    (base / "README.md").write_text(card_of_license("apache-2.0"))
    said = BaseCard({"license": "apache-2.0", "license_link": "https://example.org/L"}, "llama")
    assert read_base_card(Run(run), "owner/base", offline=True) == said
    for damaged in ("[mit", "'mit](https://evil)'", "[a, b]"):
        (base / "README.md").write_text(card_of_license(damaged))
        assert read_base_card(Run(run), "owner/base", offline=True).license == {}


def test_the_quickstarts_base_names_its_license(tmp_path: Path) -> None:
    run = write_tiny_run(tmp_path / "run")
    assert read_base_card(Run(run), None, offline=True) == BaseCard({"license": "mit"}, "gpt_neox")


def test_what_a_base_says_is_read_from_the_hub(hub: HubServer, publisher: Publisher, tmp_path: Path) -> None:
    hub.put("owner/base", {"README.md": card_of_license("gpl-3.0").encode(), "config.json": b'{"model_type": "llama"}'})
    run = change_settings(write_tiny_run(tmp_path / "run"), base="owner/base")
    done = publisher.command(run, "--repo_id", "tester/set", "--dry_run")
    assert done.returncode == 0, done.output
    data = ModelCard.load(run / "repository" / "README.md").data
    assert (data.license, data.base_model, "llama" in data.tags) == ("gpl-3.0", "owner/base", True)
