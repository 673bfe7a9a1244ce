from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
import yaml
from bases import tiny_neox, write_base_of_words
from forking import ForkServer
from hub_server import HubServer, copy_repository
from huggingface_hub import ModelCard, constants
from huggingface_hub.utils import get_session
from publishing import Publisher
from tiny_run import PROMPT, final_fvu, write_tiny_run
from tokenizers.pre_tokenizers import Split
from transformers import AutoModelForCausalLM, AutoTokenizer

from bilinear_tc.configuration_bilinear_tc import BilinearTCConfig
from bilinear_tc.train.errors import UserError
from bilinear_tc.train.measuring.evaluation import Evaluation, LayerScores
from bilinear_tc.train.recipe import Recipe
from bilinear_tc.train.run import Run
from bilinear_tc.upload.base_card import BaseCard
from bilinear_tc.upload.figures import FIGURES, draw_figures
from bilinear_tc.upload.findings import distrust, findings
from bilinear_tc.upload.legacy import export_run
from bilinear_tc.upload.model_card import check_card, relative_links, write_model_card
from bilinear_tc.upload.tables import format_duration, format_fvu, format_nats, layer_ranges, like_layers

SECTIONS = [
    "Overview",
    "Usage",
    "Performance summary",
    "Key findings",
    "Limits",
    "Architecture",
    "Training details",
    "Repository structure",
    "Checkpoint contents",
    "Citation",
    "License",
    "Acknowledgments",
]
# The scores on the earlier set's card; where it gives a range, its ends and values between them.
EARLIER = {0: 0.0075, 1: 0.167, 2: 0.174, 3: 0.037, **dict.fromkeys(range(4, 22), 0.05), 22: 0.066, 23: 0.0259}


def change_settings(run: Path, **changes: Any) -> Path:
    """Rewrites settings wherever the run holds them."""
    for path in (run / "recipe.yaml", *run.glob("layer_*/config.yaml")):
        settings = yaml.safe_load(path.read_text()) | changes
        path.write_text(yaml.safe_dump(settings, sort_keys=False))
    for path in run.glob("layer_*/config.json"):
        config = json.loads(path.read_text())
        config["base_model"] = changes.get("base", config["base_model"])
        config["base_revision"] = changes.get("base_revision", config.get("base_revision"))
        path.write_text(json.dumps(config))
    return run


def change_fvu(run: Path, fvu: dict[int, float], **scores: Any) -> Path:
    """Rewrites evaluation.json with these FVUs; other scores of a layer are replaced by `scores`."""
    evaluation = json.loads((run / "evaluation.json").read_text())
    evaluation["layers"] = {
        str(layer): {"fvu": value, "variance_explained": 1 - value, **scores} for layer, value in fvu.items()
    }
    if not scores:
        del evaluation["all_layers"]
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    return run


def pythia_run(folder: Path, **kwargs: Any) -> Path:
    run = write_tiny_run(folder, **kwargs)
    return change_settings(run, base="EleutherAI/pythia-410m", dataset="monology/pile-uncopyrighted")


def write(run: Path, repo_id: str | None = "you/name", author: str | None = "A. Thor", **said: Any) -> str:
    """The card that a run's folder gets."""
    return write_model_card(Run(run), repo_id=repo_id, author=author, **said).read_text(encoding="utf-8")


def section(card: str, name: str) -> str:
    return re.search(rf"^## {name}\n(.*?)(?=^## |\Z)", card, flags=re.DOTALL | re.MULTILINE)[1]


def table(text: str, first: str) -> list[list[str]]:
    """The rows below the header that begins with `first`."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {first} |"))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def test_metadata_parse_back_as_the_hub_reads_them(tmp_path: Path) -> None:
    run = pythia_run(tmp_path / "run", layers=range(3))
    write(run, base_card=BaseCard({"license": "apache-2.0"}, "gpt_neox"))
    data = ModelCard.load(run / "README.md").data
    assert (data.license, data.library_name, data.base_model) == (
        "apache-2.0",
        "transformers",
        "EleutherAI/pythia-410m",
    )
    of_set, of_base = BilinearTCConfig.model_type, ["pythia", "gpt_neox"]
    assert data.tags == ["mechanistic-interpretability", "transcoding", "bilinear", of_set, *of_base, "mlp"]
    assert data.datasets == ["monology/pile-uncopyrighted"]
    assert data.model_name == "name"
    mean = sum(final_fvu(layer) for layer in range(3)) / 3
    metrics = {result.metric_type: result for result in data.eval_results}
    assert metrics["fvu"].metric_value == pytest.approx(mean, abs=1e-6)
    assert metrics["fvu_ordinary"].metric_value == pytest.approx(1.1 * mean, abs=1e-6)
    assert metrics["jacobian_cosine"].metric_value == pytest.approx(1 - mean, abs=1e-6)
    assert metrics["variance_explained"].metric_value == pytest.approx(1 - mean, abs=1e-6)
    assert "held out" in metrics["fvu"].metric_name


def test_all_sections_are_there_in_order(tmp_path: Path) -> None:
    card = write(write_tiny_run(tmp_path / "run"))
    assert re.findall(r"^## (.*)$", card, flags=re.MULTILINE) == SECTIONS
    for name in SECTIONS:
        assert len(section(card, name).split()) >= 4, name


def test_what_the_base_says_with_all_its_mlps_replaced_can_be_read(tmp_path: Path) -> None:
    run = write_tiny_run(tmp_path / "run", layers=range(3))
    card = write(run)
    summary = " ".join(section(card, "Performance summary").split())
    assert "rises by 0.2100 ± 0.0130 nats; the KL" in summary
    assert "next token is the base's own at 85.12% ± 0.31% of the tokens." in summary
    assert (
        "64 held-out prompts of 32 tokens were continued greedily, by the base and with all its MLPs replaced. Of 48 "
        "tokens, the first that is not the base's own is number 9.5 in the median and 13.3 ± 1.5 in the mean"
    ) in summary
    assert f"\n`````text\n{PROMPT}\n`````\n" in card
    assert "\nThe base goes on:\n\n```text\n is\n\nhere.\n```\n" in card
    assert "\nWith all its MLPs replaced:\n\n```text\n was\n```\n" in card
    assert "nowhere.md" not in relative_links(card)
    assert "stays the same at 85.12% of the tokens" in section(card, "Key findings")

    evaluation = json.loads((run / "evaluation.json").read_text())
    for name in ("prompt", "base", "replaced"):  # without a tokenizer
        del evaluation["continuations"][name]
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    card = write(run)
    assert "number 9.5 in the median" in card
    assert "goes on" not in card
    del evaluation["continuations"], evaluation["all_layers"]["top1"]  # as an earlier version left it
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    card = write(run)
    assert "rises by 0.2100" in card
    assert not any(words in card for words in ("continued greedily", "most likely next token stays", "85.12"))


def test_layers_are_grouped_as_on_the_earlier_card(tmp_path: Path) -> None:
    run = change_fvu(write_tiny_run(tmp_path / "run", layers=range(24)), EARLIER)
    summary = section(write(run), "Performance summary")
    rows = table(summary, "Layers")
    assert [(row[0], row[1], row[-1]) for row in rows] == [
        ("0", "0.0075", "best"),
        ("1–2", "0.1670–0.1740", "hardest: layer 2"),
        ("3–22", "0.0370–0.0660", ""),
        ("23", "0.0259", ""),
        ("**average**", f"**{sum(EARLIER.values()) / 24:.4f}**", ""),
    ]
    full = table(summary, "Layer")
    assert [row[:2] for row in full[:-1]] == [[str(layer), f"{fvu:.4f}"] for layer, fvu in EARLIER.items()]
    assert summary.index("<details>") < summary.index("| Layer |") < summary.index("</details>")


def test_groups_are_cut_at_missing_layers_and_at_a_factor_of_two() -> None:
    assert like_layers({0: 1.0, 1: 2.0, 2: 2.1, 4: 2.1, 5: 0.9}) == [[0, 1], [2], [4], [5]]
    assert like_layers({7: 0.0, 8: 0.0, 9: 0.1}) == [[7, 8], [9]]
    assert layer_ranges([0, 1, 2, 5, 7, 8]) == "0–2, 5, 7–8"


def test_every_relative_link_and_image_exists(tmp_path: Path) -> None:
    run = write_tiny_run(tmp_path / "run", layers=range(8))
    draw_figures(Run(run), run / FIGURES)
    card = write(run)
    links = relative_links(card)
    assert sorted(links) == sorted(
        [
            "figures/all_layers_comparison.png",
            "figures/derivatives_by_layer.png",
            "figures/training_curves_overlaid_layers_0_5.png",
            "figures/training_curves_overlaid_layers_6_7.png",
            "recipe.yaml",
        ]
    )
    assert all((run / link).is_file() for link in links)
    for alt in re.findall(r"!\[(.*)\]\(", card):
        assert len(alt.split()) > 12  # says what the figure shows
    (run / "recipe.yaml").unlink()
    with pytest.raises(UserError, match=r"links to recipe\.yaml"):
        check_card(card, run)
    with pytest.raises(UserError, match="not a Hub id"):
        check_card(card.replace("library_name:", "base_model: /home/me/base\nlibrary_name:"), run)


def test_no_figure_no_image(tmp_path: Path) -> None:
    run = write_tiny_run(tmp_path / "run")
    assert "![" not in write(run)


@pytest.mark.parametrize("evaluation", [True, False])
def test_the_card_says_where_its_numbers_come_from(tmp_path: Path, evaluation: bool) -> None:
    run = write_tiny_run(tmp_path / "run", evaluation=evaluation, steps=60)
    card = write(run)
    summary = section(card, "Performance summary")
    fvu = float(table(summary, "Layer")[1][1])
    if evaluation:
        assert "Measured on held-out text: 65,536 tokens" in summary
        assert "raining-batch numbers" not in card
        assert fvu == pytest.approx(1.1 * final_fvu(1), abs=1e-4)  # on ordinary tokens
    else:
        assert "training-batch numbers" in summary
        assert "last 50 training batches" in summary
        assert "Held-out" not in card
        history = [final_fvu(1) + (0.9 - final_fvu(1)) * (1 - step / 59) ** 2 for step in range(60)]
        assert fvu == pytest.approx(sum(history[10:]) / 50, abs=1e-4)
        assert "has not been measured" in section(card, "Limits")


def test_the_earlier_card_is_quoted_for_its_base_only(tmp_path: Path) -> None:
    quoted = ("0.0657", "75 minutes a layer", "A100")
    pythia = section(write(pythia_run(tmp_path / "pythia")), "Training details")
    assert all(fact in pythia for fact in quoted)
    assert "card of an earlier set" in pythia
    other = write(change_settings(write_tiny_run(tmp_path / "other"), base="EleutherAI/pythia-70m"))
    assert not any(fact in other for fact in quoted)
    assert "  - pythia" in other or "- pythia\n" in other


def test_the_earlier_cards_sentences_are_not_reused(tmp_path: Path) -> None:
    run = pythia_run(tmp_path / "run", layers=range(24))
    export_run(Run(run), None)
    words = re.findall(r"\w+", re.sub(r"```.*?```", "", write(run), flags=re.DOTALL))
    text = " ".join(words).lower()
    for sentence in (
        "auxiliary models that learn to approximate",
        "use a hadamard neural network architecture",
        "dramatically easier to approximate",
        "if you use these transcoders in your research",
        "contain complex transformations",
    ):
        assert sentence not in text


def test_a_local_dataset_has_no_link(tmp_path: Path) -> None:
    run = change_settings(pythia_run(tmp_path / "run"), dataset="/data/texts/*.jsonl")
    evaluation = json.loads((run / "evaluation.json").read_text()) | {"dataset": "/data/texts/*.jsonl"}
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    card = write(run)
    data = ModelCard(card).data
    assert data.datasets is None
    assert re.fullmatch(r"[\w.-]+", data.eval_results[0].dataset_type)
    assert "/data/texts" not in card
    assert "huggingface.co/datasets" not in card


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("EleutherAI/pythia-410m", "pythia"),
        ("EleutherAI/pythia-1.4b-deduped", "pythia"),
        ("openai-community/gpt2", "gpt2"),
        ("EleutherAI/gpt-neo-125m", "gpt-neo"),
        ("meta-llama/Llama-3.2-1B", "llama"),
        ("google/gemma-2-2b", "gemma"),
    ],
)
def test_the_bases_family_is_a_tag(tmp_path: Path, name: str, family: str) -> None:
    run = change_settings(write_tiny_run(tmp_path / "run", layers=(0,)), base=name)
    data = ModelCard(write(run, repo_id=None)).data
    assert data.tags[4] == family
    assert data.base_model == name


def test_a_subset_of_layers(tmp_path: Path) -> None:
    run = write_tiny_run(tmp_path / "run", layers=(1, 2, 6))
    card = write(run)
    assert "layers 1–2, 6 of" in card
    assert "layers = [1, 2, 6]" in card
    assert 'subfolder="layer_1"' in card
    assert [row[0] for row in table(card, "Layer")] == ["1", "2", "6", "mean"]
    assert "layer_2/ … layer_6/" in card
    assert "layer 0" not in card


def test_one_layer(tmp_path: Path) -> None:
    card = write(write_tiny_run(tmp_path / "run", layers=(3,)))
    assert "the MLP of layer 3" in card
    assert [row[0] for row in table(card, "Layers")] == ["3"]
    assert "**average**" not in card
    assert "ExitStack" not in card
    assert "All layers" not in card


def test_the_printed_form_prints_its_own_formula(tmp_path: Path) -> None:
    card = write(write_tiny_run(tmp_path / "run", form="input_sum", n_inputs=8, n_hidden=16))
    architecture = section(card, "Architecture")
    assert "W_left( (Σᵢ x̂ᵢ) · W_right(x̂) )" in architecture
    assert f"{8 * 16 + 16 * 8 + 8:,}" in architecture
    assert "head" not in architecture


def test_parameters_are_counted(tmp_path: Path) -> None:
    run = write_tiny_run(tmp_path / "run", n_inputs=8, n_hidden=16)
    assert f"| Parameters a layer | {2 * (8 * 16 + 16) + 16 * 8 + 8} |" in write(run)


def test_training_details_are_those_recorded(tmp_path: Path) -> None:
    run = write_tiny_run(tmp_path / "run", steps=5)
    fit = {"steps": 5, "tokens": 20480, "seconds": 814, "device": "NVIDIA H100", "processes": 2, "dtype": "bfloat16"}
    rows = dict(table(section(write(change_settings_fit(run, fit)), "Training details"), "Setting"))
    assert rows["Wall time"] == "13.6 minutes for all layers together, as measured"
    assert rows["Device"] == "2 × NVIDIA H100, computing in bfloat16"
    assert rows["Batch"] == "32 sequences of 128 tokens (4,096 rows)"
    assert rows["Tokens"] == "20,480"
    assert rows["Optimizer"].startswith("Muon on the matrices, AdamW on the biases; learning rate 0.01")
    unmeasured = dict(table(section(write(change_settings_fit(run, {"steps": 5})), "Training details"), "Setting"))
    assert not {"Wall time", "Device", "Software"} & set(unmeasured)


@pytest.mark.parametrize(
    ("optimizer", "words"),
    [
        ("muon", "Muon on the matrices, AdamW on the biases; learning rate"),
        ("normuon", "NorMuon on the matrices, AdamW on the biases; learning rate"),
        ("adamw", "AdamW; learning rate"),
    ],
)
def test_every_optimizer_of_a_recipe_has_a_name(tmp_path: Path, optimizer: str, words: str) -> None:
    choices = get_args(get_type_hints(Recipe)["optimizer"])
    assert set(choices) == {"muon", "normuon", "adamw"}  # a new one wants a name in the card
    run = change_settings(write_tiny_run(tmp_path / "run", layers=(0,)), optimizer=optimizer)
    rows = dict(table(section(write(run), "Training details"), "Setting"))
    assert rows["Optimizer"].startswith(words)


def change_settings_fit(run: Path, fit: dict[str, Any]) -> Path:
    for path in run.glob("layer_*/config.yaml"):
        path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"fit": fit}))
    return run


def test_durations_are_in_the_unit_one_would_say() -> None:
    assert [format_duration(s) for s in (3.21, 119, 150, 8000)] == [
        "3.2 seconds",
        "119.0 seconds",
        "2.5 minutes",
        "2.2 hours",
    ]
    assert [format_fvu(v) for v in (0.0, 0.00012, 0.0075, 0.5)] == ["0.0000", "1.2e-04", "0.0075", "0.5000"]


def test_pt_checkpoints_are_described_where_they_are(tmp_path: Path) -> None:
    run = write_tiny_run(tmp_path / "run", steps=4)
    assert "model_state_dict" not in write(run)
    export_run(Run(run), None)
    card = write(run)
    contents = section(card, "Checkpoint contents")
    assert "transcoder_weights_l0_bilinear_muon_4b.pt" in contents
    written = torch.load(run / "layer_0" / "transcoder_weights_l0_bilinear_muon_4b.pt")
    for key in written:
        assert f"`{key}`" in contents
    assert "transcoder_weights_l0_bilinear_muon_4b.pt" in section(card, "Repository structure")


def measured(fvu: list[float], **others: list[float]) -> Evaluation:
    layers = {
        layer: LayerScores(fvu=value, variance_explained=1 - value, **{name: v[layer] for name, v in others.items()})
        for layer, value in enumerate(fvu)
    }
    return Evaluation(layers=layers, dataset="text", split="validation", tokens=100, base_ce=3.0)


def with_scores(run: Path, **layers: dict[str, Any]) -> Path:
    """Rewrites evaluation.json with these scores of `layer_0` and so on."""
    evaluation = json.loads((run / "evaluation.json").read_text())
    evaluation["layers"] = {name.removeprefix("layer_"): scores for name, scores in layers.items()}
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    return run


# Layer 1 looks best over all tokens, which a few massive ones carry, and is the hardest over ordinary ones.
CARRIED: dict[str, dict[str, Any]] = {
    "layer_0": {
        **{"fvu": 0.1, "variance_explained": 0.9, "fvu_ordinary": 0.1, "fvu_ordinary_se": 0.002, "massive_share": 0.0},
        **{"jacobian_cosine": 0.9, "jacobian_error": 0.4, "interchange": {"embedding": 0.8, "mlp 0": 0.7}},
        **{"halfway": 0.6, "low_variance_share": 0.1},
    },
    "layer_1": {
        **{"fvu": 0.02, "variance_explained": 0.98, "fvu_ordinary": 0.25},
        **{"massive_share": 0.0085, "massive_error": 0.003, "worst_channel": {"index": 507, "share": 0.62}},
        **{"jacobian_cosine": 0.3, "jacobian_error": 1.9, "interchange": {"embedding": -1.9, "mlp 0": -0.2}},
        **{"halfway": 0.7, "low_variance_share": 0.88},
    },
}


def test_the_figure_for_ordinary_tokens_is_the_headline(tmp_path: Path) -> None:
    card = write(with_scores(write_tiny_run(tmp_path / "run"), **CARRIED))
    rows = table(section(card, "Performance summary"), "Layers")
    assert [(row[0], *row[1:3], row[-1]) for row in rows] == [
        ("0", "0.1000", "0.1000", "best"),
        ("1", "0.2500", "0.0200", "hardest"),
        ("**average**", "**0.1750**", "**0.0600**", ""),
    ]
    assert "82.50% of the MLPs' output variance explained on average on ordinary tokens" in section(card, "Overview")
    assert "(FVU 0.1750; on all tokens 0.0600)" in section(card, "Overview")
    found = section(card, "Key findings")
    assert "**Layer 0 is the easiest" in found
    assert "at most 0.85% of all, are in layer 1; their own relative error is at most 0.0030" in found
    assert "hide most at layer 1, whose FVU is 0.0200 on all tokens and 0.2500 on ordinary ones" in found
    assert "channel 507 at layer 1 (62%)" in found
    layers = table(section(card, "Performance summary"), "Layer")
    assert layers[0][1] == "0.1000 ± 0.0020"
    header = next(line for line in card.splitlines() if line.startswith("| Layer |")).strip("|").split("|")
    shares = next(i for i, name in enumerate(header) if name.strip() == "Massive tokens")
    assert [row[shares : shares + 2] for row in layers[:2]] == [["0.00%", "–"], ["0.85%", "0.0030"]]


def test_the_card_says_when_not_to_trust_a_reading_of_which_layers(tmp_path: Path) -> None:
    run = with_scores(write_tiny_run(tmp_path / "run"), **CARRIED)
    card = write(run)
    limits = section(card, "Limits")
    assert "**Do not take the weights of layer 1 for" in limits
    assert "below 0.71 there (lowest: 0.300, layer 1)" in limits
    assert "**Do not predict interventions with layer 1.**" in limits
    assert "layer 1 (embedding, R² -1.900 and 1 more)" in limits
    assert "**The top eigenvectors of layer 1** lie mostly (88%)" in limits
    assert "layer 0" not in limits.split("And in general")[0]
    assert "-1.900 (embedding)" in section(card, "Performance summary")
    assert "speaks against reading" not in limits


def test_a_set_that_passes_every_measured_test_of_its_weights_is_said_to() -> None:
    def said(**scores: Any) -> str:
        layer = LayerScores(fvu=0.1, variance_explained=0.9, **scores)
        return " ".join(distrust(Evaluation(layers={0: layer})))

    assert "cosine is at least 0.71" in (alone := said(jacobian_cosine=0.72))
    assert "interchange" not in alone
    assert "eigenvectors" not in alone
    everything = said(jacobian_cosine=0.72, interchange={"embedding": 0.1}, low_variance_share=0.4)
    assert "every interchange R² is above 0, the top eigenvectors lie mostly where the inputs vary" in everything
    for worse in ({"jacobian_cosine": 0.7}, {"interchange": {"embedding": 0.0}}, {"halfway": -0.1}):
        assert "speaks against" not in said(**{"jacobian_cosine": 0.72, **worse})


def test_what_an_earlier_version_did_not_measure_is_not_spoken_of(tmp_path: Path) -> None:
    run = change_fvu(write_tiny_run(tmp_path / "run"), {0: 0.1, 1: 0.3})
    card = write(run)
    for word in ("ordinary", "Jacobian", "nterchange", "eigenvectors lie", "massive", "standard error", "KL"):
        assert word not in card, word
    assert table(card, "Layers")[0][:2] == ["0", "0.1000"]
    assert "has not been measured" in section(card, "Limits")
    data = ModelCard(card).data
    assert [result.metric_type for result in data.eval_results] == ["fvu", "variance_explained"]


def test_a_measure_that_some_layers_lack_has_a_dash_there(tmp_path: Path) -> None:
    scores = {name: dict(own) for name, own in CARRIED.items()}
    del scores["layer_0"]["interchange"]
    card = write(with_scores(write_tiny_run(tmp_path / "run"), **scores))
    rows = table(section(card, "Performance summary"), "Layers")
    assert [row[-2] for row in rows] == ["–", "-1.900", "**–**"]


def test_a_closed_form_set_says_what_it_was_solved_on(tmp_path: Path) -> None:
    run = change_settings(write_tiny_run(tmp_path / "run", steps=0), normalization="batch")
    card = write(change_settings_fit(run, {"steps": 0, "tokens": 65536}))
    rows = dict(table(section(card, "Training details"), "Setting"))
    assert rows["Calibration"] == "65,536 tokens, in sequences of 128"
    assert rows["Optimizer steps"] == "0"
    assert "calibration sample" in rows["Normalization"]
    assert not {"Loss", "Optimizer", "Batch", "Tokens"} & set(rows)
    assert "batch's own" not in card


JOINT: dict[str, Any] = {
    **{"steps": 216, "tokens": 884736, "anchor": 0.5, "optimizer": "muon", "lr": 0.01, "kept": "end"},
    "before": {"ce_increase": 0.0812, "kl": 0.0936, "mean_fvu": 0.1204, "fvu": 0.1},
    "after": {"ce_increase": 0.0433, "kl": 0.0512, "mean_fvu": 0.1198, "fvu": 0.1},
}


def test_a_joint_set_says_its_stage_and_what_it_was_before(tmp_path: Path) -> None:
    """And a set on another branch is loaded from there."""

    def told(**settings: Any) -> Path:
        for path in run.glob("layer_*/config.yaml"):
            path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | settings))
        return run

    run = write_tiny_run(tmp_path)
    told(stage="joint", joint=JOINT)
    card = write(run, revision="joint")
    assert "**Stage**: joint" in section(card, "Overview")
    (before, after) = table(card, "joint finish")
    assert (before, after) == (["before", "0.0812", "0.0936", "0.1204"], ["after", "0.0433", "0.0512", "0.1198"])
    assert "216 steps, 884,736 tokens; loss: KL from the base's predictions + 0.5 ×" in section(
        card, "Training details"
    )
    assert card.count('revision="joint"') == card.count("trust_remote_code=True)") == 2
    assert "further from its MLP" not in card
    worse = JOINT | {"after": JOINT["after"] | {"mean_fvu": 0.1304}}
    assert "further from its MLP than before" in write(told(joint=worse))
    assert "Stage" not in section(write(told(joint=JOINT | {"kept": "start"})), "Overview")
    assert "Stage" not in section(write(told(stage="layer-wise", joint=None)), "Overview")


def test_the_predecessor_on_the_hub_is_linked(tmp_path: Path) -> None:
    link = "[Elriggs/hnn_transcoders](https://huggingface.co/Elriggs/hnn_transcoders)"
    card = write(pythia_run(tmp_path / "run"))
    assert link in section(card, "Acknowledgments")
    assert link in section(card, "Training details")


OTHER = {"license": "other", "license_name": "llama3", "license_link": "https://example.org/LICENSE"}


@pytest.mark.parametrize(
    ("init", "given", "of_base", "named", "words"),
    [
        ("mlp", None, {"license": "apache-2.0"}, "apache-2.0", "`apache-2.0`, as [EleutherAI/pythia-410m]"),
        ("mlp", None, OTHER, "other", "[`llama3`](https://example.org/LICENSE), as [EleutherAI/pythia-410m]"),
        ("mlp", None, {}, None, "No license is named for these weights."),
        ("mlp", "cc-by-4.0", {}, "cc-by-4.0", "names no license that could be read"),
        ("mlp", "mit", {"license": "gemma"}, "mit", "whose card names `gemma`: its terms hold for them too"),
        ("random", None, {"license": "apache-2.0"}, None, "whoever published them has chosen none"),
        ("random", "mit", {"license": "apache-2.0"}, "mit", "`mit`."),
    ],
)
def test_the_license_is_the_bases_where_the_weights_are(
    tmp_path: Path, init: str, given: str | None, of_base: dict[str, str], named: str | None, words: str
) -> None:
    run = change_settings(pythia_run(tmp_path / "run", layers=(0,)), init=init)
    card = write(run, license=given, base_card=BaseCard(of_base))
    data = ModelCard(card).data.to_dict()
    assert data.get("license") == named
    assert data.get("license_link") == (OTHER["license_link"] if named == "other" else None)
    assert words in section(card, "License")
    assert ("apache" in section(card, "License")) == (named == "apache-2.0")


def test_findings_follow_from_the_numbers() -> None:
    sentences = findings(measured([0.2, 0.1, 0.4, 0.3, 0.3, 0.3], fvu_linear=[0.4, 0.3, 0.6, 0.6, 0.8, 0.6]))
    assert "Layer 1 is the easiest" in sentences[0]
    assert "layer 2 the hardest" in sentences[0]
    assert "4.0 times as much" in sentences[0]
    assert "Layers 2–5 are alike" in sentences[1]
    assert "0.1500 over layers 0–1, 0.3500 over layers 2–3 and 0.3000 over layers 4–5" in sentences[2]
    assert "is 0.5500, the bilinear transcoder's is 0.2667, 2.1 times lower" in sentences[3]
    assert "smallest at layer 2 (a factor of 1.5) and largest at layer 1 (3.0)" in sentences[3]
    assert len(sentences) == 4


def test_findings_own_up_to_layers_where_a_line_does_as_well() -> None:
    assert "as good or better at layers 0" in findings(measured([0.3, 0.1], fvu_linear=[0.2, 0.3]))[-1]
    worse = findings(measured([0.3, 0.3], fvu_linear=[0.2, 0.2]))[-1]
    assert "lower" not in worse
    assert "layers 0–1" in worse


def test_the_costliest_layer_need_not_be_the_hardest() -> None:
    other = findings(measured([0.1, 0.2], ce_increase=[0.05, 0.01]))[-1]
    assert "by 0.0100 (layer 1) to 0.0500 (layer 0)" in other
    assert "not layer 1, the one with the highest FVU" in other
    assert "also the one with the highest FVU" in findings(measured([0.1, 0.2], ce_increase=[0.01, 0.05]))[-1]


@pytest.mark.parametrize(("value", "plain", "signed"), [(-4e-6, "0.0000", "+0.0000"), (-0.01, "-0.0100", "-0.0100")])
def test_a_rise_that_rounds_to_nothing_is_no_negative_zero(value: float, plain: str, signed: str) -> None:
    assert (format_nats(value), format_nats(value, sign="+")) == (plain, signed)


def test_citation_names_author_and_url(tmp_path: Path) -> None:
    run = write_tiny_run(tmp_path / "run")
    citation = section(write(run, "some_one/set", "A & B"), "Citation")
    assert r"author    = {A \& B}" in citation
    assert "url       = {https://huggingface.co/some_one/set}" in citation
    assert r"author    = {some\_one}" in section(write(run, "some_one/set", None), "Citation")
    nobody = section(write(run, None, None), "Citation")
    assert "author" not in nobody
    assert "url" not in nobody


@pytest.mark.slow
def test_writing_again_gives_the_same_card(tmp_path: Path) -> None:
    run = write_tiny_run(tmp_path / "run", layers=range(2))
    draw_figures(Run(run), run / FIGURES)
    assert write(run) == write(run)
    assert not list(run.glob(".*"))


@pytest.fixture
def spliced(tmp_path: Path) -> tuple[Path, Path]:
    """A run, and a base on disk that it fits: three layers of width 8."""
    letters = [chr(code) for code in range(32, 127)]
    model = tiny_neox(vocab_size=300, hidden_size=8, intermediate_size=16, max_position_embeddings=128)
    half = model.half()  # as Pythia is on the Hub
    base = write_base_of_words(tmp_path / "base", half, letters, Split("", "isolated"))
    run = change_settings(write_tiny_run(tmp_path / "run", layers=range(3)), base="tester/tiny-neox")
    (run / "tester").mkdir()
    (run / "tester" / "tiny-neox").symlink_to(base)  # where a reader without the Hub has it
    return run, base


def test_the_snippets_run_as_printed(
    spliced: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, base = spliced
    card = write(run, repo_id=None)
    snippets = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    assert len(snippets) == 3
    monkeypatch.chdir(run)
    capsys.readouterr()
    names: dict[str, Any] = {}
    for snippet in snippets:
        exec(snippet, names)
    printed = capsys.readouterr().out.splitlines()

    model = AutoModelForCausalLM.from_pretrained(base).float()
    inputs = AutoTokenizer.from_pretrained(base)(names["tokenizer"].decode(names["inputs"]["input_ids"][0]))
    ids = names["inputs"]["input_ids"]
    assert len(inputs["input_ids"]) >= ids.shape[1] > 20
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
    loss = -logits.gather(1, ids[0, 1:, None]).mean().item()
    assert re.fullmatch(r"FVU on this sentence: \d+\.\d{4}", printed[0])
    assert float(printed[1].split()[1].rstrip(",")) == pytest.approx(loss, abs=1e-3)
    replaced = float(printed[1].split()[-1])
    assert replaced != pytest.approx(loss, abs=1e-3)
    everything = float(printed[2].split()[-1])
    assert everything not in (pytest.approx(loss, abs=1e-3), pytest.approx(replaced, abs=1e-3))
    eigenvalues = ast.literal_eval(printed[3].split(": ")[1])
    assert [abs(v) for v in eigenvalues] == sorted((abs(v) for v in eigenvalues), reverse=True)


@pytest.mark.slow
def test_the_published_card_is_valid_and_runs_as_printed(
    fork_server: ForkServer, spliced: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Set and base both on the Hub, and a reader who has nothing but torch, transformers and the card."""
    run, base = spliced
    reader = tmp_path / "reader"
    reader.mkdir()
    with HubServer(tmp_path / "hub") as hub:
        hub.put("tester/tiny-neox", {path.name: path for path in base.iterdir()})
        done = Publisher(fork_server, hub, tmp_path / "publisher").command(run, "--repo_id", "tester/set")
        assert done.returncode == 0, done.stderr[-4000:]

        readme = copy_repository(hub, "tester/set", tmp_path / "clone") / "README.md"
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        ModelCard.load(readme).validate()

        snippets = re.findall(r"```python\n(.*?)```", readme.read_text(encoding="utf-8"), flags=re.DOTALL)
        code = "\n".join(['import sys; sys.modules["bilinear_tc"] = None', *snippets])
        environment = hub.environment(reader / "home")
        done = subprocess.run([sys.executable, "-c", code], cwd=reader, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        assert not hub.leaks
    sentence = re.search(r'tokenizer\("(.*?)"', code)[1]
    ids = AutoTokenizer.from_pretrained(base)(sentence, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        loss = AutoModelForCausalLM.from_pretrained(base).float()(input_ids=ids, labels=ids).loss.item()
    numbers = [float(number) for number in re.findall(r"-?\d+\.\d{4}\b", done.stdout)]
    fvu, printed, replaced, everything = numbers[:4]
    assert printed == pytest.approx(loss, abs=1e-3)
    assert len({fvu, printed, replaced, everything}) == 4
    assert "largest eigenvalues: [" in done.stdout


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("license: mit", "license: mine"), "license"),
        (("- bilinear\n", "- [bilinear]\n"), "tags"),
        (("base_model: EleutherAI/pythia-410m", "base_model: /models/pythia"), "base_model"),
        (("datasets:\n- monology/pile-uncopyrighted", "datasets: monology/pile-uncopyrighted"), "datasets"),
        (("model-index:\n- name: name", "model-index:\n- title: name"), "model-index"),
        (("    metrics:", "    scores:"), "model-index"),
    ],
)
def test_the_loopback_hub_refuses_cards_as_the_hub_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: tuple[str, str], message: str
) -> None:
    card = write(pythia_run(tmp_path / "run"), license="mit")
    assert change[0] in card
    with HubServer(tmp_path / "hub") as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        ModelCard(card).validate()
        order = {"content": card.replace(*change), "repoType": "model"}
        response = get_session().post(f"{hub.url}/api/validate-yaml", json=order)
        assert response.status_code == 400
        assert [message in error["message"] for error in response.json()["errors"]] == [True]


def test_the_fvu_that_the_snippet_prints(spliced: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    run, base = spliced
    snippet = re.search(r"```python\n(.*?)```", write(run, repo_id=None), flags=re.DOTALL)[1]
    monkeypatch.chdir(run)
    names: dict[str, Any] = {}
    exec(snippet, names)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    model = AutoModelForCausalLM.from_pretrained(base).float()
    model.gpt_neox.layers[0].mlp.register_forward_hook(lambda _m, i, o: seen.append((i[0], o)))
    with torch.no_grad():
        model(input_ids=names["inputs"]["input_ids"])
    ((x, y),) = seen
    torch.testing.assert_close(names["x"], x)
    torch.testing.assert_close(names["y"], y)
    assert Run(run).scores.held_out


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no layer_\* folder"):
        write_model_card(Run(tmp_path), repo_id=None, author=None)
    run = write_tiny_run(tmp_path / "run")
    (run / "layer_0" / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json is not readable"):
        write_model_card(Run(run), repo_id=None, author=None)
    assert not (run / "README.md").exists()


def test_layers_that_were_put_back_to_their_start_are_named(tmp_path: Path) -> None:
    run = pythia_run(tmp_path / "run", layers=range(4))
    assert "before the first step" not in write(run)
    for layer, kept in ((0, "start"), (1, "end"), (2, "start"), (3, "start")):
        path = run / f"layer_{layer}/config.yaml"
        settings = yaml.safe_load(path.read_text())
        settings["fit"] = (settings.get("fit") or {}) | {"kept": kept}
        path.write_text(yaml.safe_dump(settings))
    assert (
        "\nLayers 0, 2–3 are as they were before the first step, in closed form: the steps had raised their FVU on "
        "the held-out text.\n"
    ) in write(run)
