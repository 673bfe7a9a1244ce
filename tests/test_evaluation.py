"""The typed evaluation, its JSON and its tables."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from bilinear_tc.train.measuring.evaluation import Continuations, Evaluation, LayerScores, LossScores, finite
from bilinear_tc.train.measuring.tables import fit_table, loss_table

SCORES = LayerScores(
    fvu=0.1152,
    fvu_se=0.0031,
    variance_explained=0.8848,
    fvu_linear=0.7089,
    worst_channel={"index": 507, "share": 0.83},
    fvu_ordinary=0.2204,
    fvu_ordinary_se=0.0052,
    massive_share=0.0085,
    massive_norm=31.5,
    massive_error=0.0004,
    error_quantiles={"1": 0.01, "50": 0.1},
    error_by_position={"0": 0.2, "2–3": 0.3},
    jacobian_cosine=0.2799,
    interchange={"embedding": -1.9, "attention 0": 0.7},
    ce_increase=0.0066,
    ce_increase_se=0.0012,
    kl=0.0071,
    top1=0.985,
    top1_se=0.0004,
    loss_recovered=0.8642,
)
CONTINUATIONS = Continuations(
    prompts=64, prompt_tokens=32, tokens=48, same_median=9.5, same_mean=13.27, same_mean_se=1.52, prompt="A b", base=""
)
EVALUATION = Evaluation(
    layers={9: SCORES, 11: replace(SCORES, fvu=0.1, interchange=None, worst_channel=None, massive_share=0.0)},
    all_layers=LossScores(ce_increase=0.07, ce_increase_se=0.01, kl=0.1),
    continuations=CONTINUATIONS,
    dataset="essays",
    split="validation",
    tokens=65536,
    loss_tokens=2032,
    massive_rule="A token is massive if …",
    mean_se={"fvu_se": 0.0014, "ce_increase_se": 0.001},
    base="a/base",
    base_ce=2.77,
)


def test_its_json_gives_it_back_and_what_is_not_known_is_passed_over() -> None:
    content = json.loads(json.dumps(EVALUATION.to_json()))
    assert Evaluation.from_json(content) == EVALUATION
    assert content["mean"]["fvu"] == pytest.approx(0.1076)
    assert content["mean"]["fvu_se"] == 0.0014
    for scores in content["layers"].values():
        scores |= {"of_a_later_version": 3, "a_table_of_one": {"a": 1.5}}
    assert Evaluation.from_json(content) == EVALUATION


def test_what_an_earlier_version_wrote_is_read() -> None:
    scores = {"fvu": 0.1, "fvu_raw": 0.1, "variance_explained": 0.9, "mse": 0.1, "fvu_linear": 0.5}
    old = {"dataset": "d", "split": "s", "tokens": 9, "base": {}, "layers": {"0": scores}, "mean": scores}
    read = Evaluation.from_json(old)
    assert read.layers == {0: LayerScores(**scores)}
    assert (read.all_layers, read.continuations) == (None, None)
    of_all = {"ce_increase": 0.2, "kl": 0.1}
    assert Evaluation.from_json(old | {"all_layers": of_all}).all_layers == LossScores(**of_all)
    assert read.mean_se == {}
    row = fit_table(read).splitlines()[2]
    assert row.split() == ["0", "0.1000", "–", "0.5000", "–", "–", "–"]


def test_some_layers_of_it_have_no_scores_of_all_together() -> None:
    some = EVALUATION.only([11])
    assert list(some.layers) == [11]
    assert (some.all_layers, some.continuations, some.mean_se, some.tokens) == (None, None, {}, 65536)
    assert EVALUATION.only([9, 11]) == EVALUATION


def test_what_is_no_number_is_left_out_but_for_the_fvu() -> None:
    nan = float("nan")
    found = finite({"fvu": nan, "jacobian_cosine": nan, "interchange": {"embedding": nan, "mlp 0": 0.5}, "kl": None})
    assert found.keys() == {"fvu", "interchange", "kl"}
    assert found["interchange"] == {"mlp 0": 0.5}


def test_the_tables_say_what_a_reader_needs_on_a_terminals_width() -> None:
    table = fit_table(EVALUATION)
    lines = table.splitlines()
    assert max(map(len, table.splitlines())) <= 100
    assert lines[2].split() == ["9", "0.1152", "±0.0031", "0.2204", "±0.0052", "0.7089", "0.280", "-0.600", "-1.900"]
    assert lines[3].split()[-2:] == ["–", "–"]
    assert lines[4].split()[:3] == ["mean", "0.1076", "±0.0014"]
    assert lines[5:] == [
        "layer 9: 0.85% of the tokens are massive, with a relative error of 0.0004",
        "layer 9: output channel 507 carries 83% of the squared error",
    ]
    losses = loss_table(EVALUATION).splitlines()
    assert losses[0] == "the base's own loss: 2.7700 nats a token, over 2,032 predicted"
    assert losses[2].split() == ["9", "0.0066", "±0.0012", "0.0071", "98.50%", "±0.04%", "86.42%"]
    assert losses[-2].split() == ["all", "0.0700", "±0.0100", "0.1000", "–", "–"]
    assert max(map(len, losses[:-1])) <= 100
    assert losses[-1] == (
        "greedy continuations of 64 held-out prompts, all replaced: of 48 tokens, the first that is not the base's is "
        "number 9.5 (median) or 13.3 ±1.5 (mean), counted from 0"
    )
    assert loss_table(replace(EVALUATION, continuations=None)).splitlines() == losses[:-1]
