"""Pages and feature files: what they say agrees with plain loops, and what a browser makes of them is looked at."""

from __future__ import annotations

import base64
import html
import json
import random
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from bases import tiny_neox, write_base_of_words
from hub_server import HubServer
from matplotlib.image import imread
from publishing import Publisher
from tiny_run import write_tiny_run
from tokenizers.pre_tokenizers import WhitespaceSplit

from bilinear_tc.configuration_bilinear_tc import BilinearTCConfig
from bilinear_tc.modeling_bilinear_tc import BilinearTC
from bilinear_tc.train.base import Base
from bilinear_tc.train.errors import UserError
from bilinear_tc.train.recipe import Recipe
from bilinear_tc.train.run import Run
from bilinear_tc.train.text.batches import TokenBatch
from bilinear_tc.upload import publish
from bilinear_tc.upload.contexts import Context, Contexts, Spread
from bilinear_tc.upload.directions import EIGENVECTORS, Asked, alone, read
from bilinear_tc.upload.explore import ExploreSettings, explore, main
from bilinear_tc.upload.local_files import list_files
from bilinear_tc.upload.pages import readable
from bilinear_tc.upload.reading import LayerReading, writers_into
from bilinear_tc.upload.vocabulary import Vocabulary

SCRIPT = "<script>alert(1)</script>"
WORDS = ["None", "self", "a", "b", SCRIPT, "&lt;", '"quoted"']
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed, which would show the pages")


def layer(n_inputs: int = 6, n_hidden: int = 5, form: str = "bilinear", index: int = 0) -> BilinearTC:
    """A random transcoder whose inputs are correlated and leave a LayerNorm."""
    torch.manual_seed(index)
    correlated = {"input_correlation": True, "input_norm": "layernorm", "layer_index": index}
    tc = BilinearTC(BilinearTCConfig(n_inputs, n_hidden, n_inputs, form=form, bias=True, **correlated))
    for buffer in tc.buffers():
        buffer.copy_(torch.rand(buffer.shape) + 0.5)
    tc.input_correlation.copy_(torch.corrcoef(torch.randn(n_inputs, 3 * n_inputs)))
    return tc.requires_grad_(False).eval()


def small_set(folder: Path, **settings: Any) -> Path:
    """A run of three random layers for a random base of width 16 whose tokens are words, and text for it."""
    base = tiny_neox()
    torch.nn.init.uniform_(base.gpt_neox.final_layer_norm.weight, 0.5, 2)
    write_base_of_words(folder / "base", base, WORDS, WhitespaceSplit())
    random.seed(0)
    for name in ("train", "held_out"):
        (folder / f"{name}.txt").write_text(" ".join(random.choices(WORDS, k=3000)))
    run = write_tiny_run(folder / "run", layers=(0, 1, 2), n_inputs=16, n_hidden=24)
    text = {"dataset": str(folder / "train.txt"), "eval_split": str(folder / "held_out.txt"), "eval_tokens": 1024}
    changed = {"base": str(folder / "base"), **text, "seq_len": 16, "bos": "none", **settings}
    (run / "recipe.yaml").write_text(yaml.safe_dump(yaml.safe_load((run / "recipe.yaml").read_text()) | changed))
    return run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return small_set(tmp_path)


# Contexts


def loop_contexts(
    batches: list[tuple[torch.Tensor, ...]], feature: int, sign: int, count: int, before: int, after: int
) -> list[Context]:
    """By a plain loop over all tokens of all sequences."""
    found = []
    for input_ids, values, text, peaks in batches:
        for ids, value, shown, may in zip(input_ids.tolist(), values[..., feature].tolist(), text, peaks, strict=True):
            best = None
            for place in range(len(ids)):
                if may[place] and (best is None or sign * value[place] > sign * value[best]):
                    best = place
            if best is not None:
                around = [p for p in range(best - before, best + after + 1) if 0 <= p < len(ids) and shown[p]]
                context = Context([ids[p] for p in around], [value[p] for p in around], around.index(best))
                found.append((sign * value[best], len(found), context))
    return [context for _, _, context in sorted(found, key=lambda entry: (-entry[0], entry[1]))[:count]]


def test_contexts_are_those_of_a_plain_loop_over_all_tokens() -> None:
    """Values of few kinds, so that many are equal; windows that reach beyond both ends of a sequence, and padding."""
    torch.manual_seed(0)
    batches = []
    for sequences in (4, 1, 3, 5):
        input_ids, values = torch.randint(9, (sequences, 12)), torch.randint(-4, 5, (sequences, 12, 3)) / 2
        text = torch.arange(12) < torch.randint(1, 25, (sequences, 1))  # half of them are full
        batches.append((input_ids, values, text, text & (torch.rand(sequences, 12) < 0.5)))
    batches[0][-1][1] = False  # a sequence that has no context
    kept = Contexts(3, count=5, before=4, after=2)
    for batch in batches:
        kept.add(*batch)
    for feature in range(3):
        for sign in (1, -1):
            expected = loop_contexts(batches, feature, sign, 5, 4, 2)
            assert kept.of(feature, sign) == expected
            assert len(expected) == 5


def test_what_begins_a_sequence_padding_and_massive_tokens_are_no_peaks() -> None:
    tc = layer()
    (reading,) = read(tc, [Asked(unit=3)], None, None, torch.zeros(5))
    bos, seen = torch.tensor([7]), 1 + EIGENVECTORS
    of = LayerReading(tc, [reading], {}, Contexts(seen), Spread(seen, 100), massive_norm=10.0)
    torch.manual_seed(1)
    x, y = torch.randn(2, 6, 6), torch.randn(2, 6, 6)
    x[:, 0], x[0, 4], x[1, 5] = 50.0, 60.0, 70.0
    y[0, 4] = 100.0
    ids = torch.tensor([[7, 1, 2, 3, 4, 5], [7, 1, 2, 3, 4, 5]])
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[1, 5] = False
    of.add(TokenBatch(ids, mask), x, y, bos)
    counted = {1, 2, 3, 5}, {1, 2, 3, 4}
    for sign in (1, -1):
        for context in of.contexts.of(0, sign):
            whole = len(context.tokens) == 6
            assert context.tokens[context.peak] in counted[0 if whole else 1]
            assert context.tokens == ids[0, : len(context.tokens)].tolist()  # but they are shown
    assert (of.tokens, of.spread.seen) == (11, 8)
    assert of.spread.high[0] == torch.stack([tc.units(x)[b, t, 3] for b in (0, 1) for t in counted[b]]).max()


def test_the_spread_of_values_is_that_of_all_of_them_and_what_is_kept_is_bounded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values = torch.randn(100, 2)
    spread = Spread(2, 100)
    for part in values.split(7):
        spread.add(part)
    assert torch.allclose(spread.moments.mean.float(), values.mean(0))
    assert torch.allclose(spread.moments.std.float(), values.std(0, correction=0))
    assert torch.equal(spread.low, values.amin(0))
    assert torch.equal(spread.high, values.amax(0))
    assert torch.equal(spread.positive, (values > 0).sum(0).float())
    assert torch.equal(spread.sample(1), values[:, 1])
    monkeypatch.setattr("bilinear_tc.upload.contexts.SAMPLE", 30)
    few = Spread(2, 100)
    for part in values.split(7):
        few.add(part)
    assert torch.equal(few.sample(0), values[::4, 0])


# Directions


@pytest.mark.parametrize(
    ("text", "asked"),
    [
        ("logit: None - self", Asked(tokens=(" None", " self"))),
        ("logit:None - self", Asked(tokens=("None", " self"))),
        ("logit:None -self", Asked(tokens=("None", "self"))),
        ("logit: a-b", Asked(tokens=(" a-b",))),
        ("logit: -", Asked(tokens=(" -",))),
        ('logit: " -" - "\\n"', Asked(tokens=(" -", "\n"))),
        ("unit:17", Asked(unit=17)),
        ("top", Asked(top=8)),
        ("top:3", Asked(top=3)),
    ],
)
def test_directions_are_read(text: str, asked: Asked) -> None:
    assert Asked.parse(text) == asked


@pytest.mark.parametrize(
    "text", ["", "None", "logit:", "logit: ", "unit:", "unit:-1", "unit:x", "top:0", "top:", "TOP"]
)
def test_what_is_no_direction_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r'^direction must read like "logit: A - B".*, got '):
        Asked.parse(text)


def test_a_bad_quotation_is_refused() -> None:
    with pytest.raises(UserError, match=r'^a token in quotes must be a JSON text, got "\\q": Invalid'):
        Asked.parse('logit: "\\q"')


@pytest.mark.parametrize("form", ["bilinear", "input_sum"])
def test_a_unit_alone_is_the_unit(form: str) -> None:
    tc, x = layer(form=form), torch.randn(20, 6)
    for unit in range(5):
        assert torch.allclose(alone(tc, unit)(x)[:, 0], tc.units(x)[:, unit], atol=1e-5)


def test_readings_give_the_units_directions_and_eigenvectors_values_and_their_shares_are_all_of_the_variance() -> None:
    tc, base = layer(16, 8), Base(tiny_neox(), tokenizer=None)
    words = dict[str, int](zip(["x", "y"], (3, 7), strict=True))

    class Words:
        token = words.__getitem__

    unit, direction = read(tc, [Asked(unit=2), Asked(tokens=("x", "y")), Asked(unit=2)], base, Words(), torch.zeros(8))
    x = torch.randn(50, 16)
    u = tc.logit_direction(base.model, 3, 7)
    given = x, tc.units(x), tc(x)
    assert torch.allclose(unit.values(*given)[:, 0], tc.units(x)[:, 2])
    assert torch.allclose(direction.values(*given)[:, 0], tc(x) @ u)
    vectors = tc.spectrum(u).eigenvectors[:, :EIGENVECTORS]
    assert torch.allclose(direction.values(*given)[:, 1:].abs(), ((x - tc.input_mean) @ vectors).abs(), atol=1e-4)
    assert direction.linear_share == pytest.approx(1 - tc.spectrum(u).share[-1].item(), abs=1e-4)
    # a unit's form has two eigenvalues, and those and its linear part are all of it
    assert unit.linear_share + unit.spectrum.share[-1].item() == pytest.approx(1, abs=1e-4)
    assert [f.index for reading in (unit, direction) for f in reading.features] == [2, 8, 9, 11, 12, 13]
    assert torch.equal(unit.features[0].raises, tc.writers()[2])


def test_top_is_the_strongest_units_once_each() -> None:
    tc = layer()
    readings = read(tc, [Asked(unit=4), Asked(top=3)], None, None, torch.tensor([1.0, 5.0, 2.0, 0.0, 9.0]))
    assert [reading.unit for reading in readings] == [4, 1, 2]


def test_the_units_that_write_into_a_feature_are_those_of_a_plain_loop() -> None:
    tcs = {index: layer(index=index) for index in (0, 1, 3)}
    stds = {index: torch.rand(5) for index in tcs}
    vector = torch.randn(6)
    effects = {}
    for index in (0, 1):
        for unit in range(5):
            written = tcs[index].writers()[unit] * stds[index][unit]
            normed = (written - written.mean()) * tcs[3].norm_weight
            effects[index, unit] = (normed @ vector).item()
    total = sum(effect**2 for effect in effects.values())
    strongest = sorted(effects, key=lambda key: -abs(effects[key]))[:4]
    found = writers_into(tcs[3], vector, tcs, stds)
    assert [(w.layer, w.unit) for w in found] == strongest
    for writer in found:
        effect = effects[writer.layer, writer.unit]
        assert writer.share == pytest.approx(effect**2 / total, rel=1e-4)
        assert writer.sign == (1 if effect > 0 else -1)
    assert writers_into(tcs[0], vector, tcs, stds) == []


# What the command says and writes


def write(run: Path, **settings: Any) -> tuple[str, list[dict[str, Any]]]:
    """The page of the last layer asked for, and its features."""
    page = explore(str(run), ExploreSettings(**settings))[-1]
    features = page.parent / "features" / page.stem
    return page.read_text(encoding="utf-8"), [json.loads(path.read_text()) for path in sorted(features.iterdir())]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"layer": "7"}, r"run has no layer 7: name one that it has \(0, 1, 2\) with --layer"),
        ({"layer": "x"}, "layers must read like 0-5,9, got 'x'"),
        ({"direction": ["unit:24"]}, "layer 0 has units 0 to 23, but unit:24 was asked for"),
        ({"direction": ["logit:None self"]}, "a logit is of one token of the base, but 'None self' is 2, .*: name one"),
        ({"direction": ["logit:other"]}, "a logit is of one token of the base, but 'other' is none: name one"),
        ({"direction": ["nothing"]}, "direction must read like .*, got 'nothing'"),
        ({"base": "/nowhere"}, "the base '/nowhere' .*"),
        ({"tokens": 0}, "eval_tokens must be at least 1, got 0"),
        ({"split": "train"}, "split 'train' of .* is what the set was fitted on: .*"),
        (
            {"base": "train/quickstart"},
            ".*run is of another base: the MLPs of train/quickstart map width 128 to 128, .*",
        ),
    ],
    ids=lambda value: "" if isinstance(value, str) else str(value),
)
def test_bad_input_is_one_sentence_and_writes_nothing(run: Path, settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError) as error:
        explore(str(run), ExploreSettings(**{"layer": "0"} | settings))
    assert re.search(rf"{sentence}$", str(error.value)), error.value
    assert "\n" not in str(error.value)
    assert not (run / "pages").exists()


def test_feature_files_have_the_fields_that_circuit_tracer_reads(run: Path) -> None:
    _, features = write(run, layer="1", direction=["unit:5", "logit:None -self"], tokens=512)
    assert sorted(feature["index"] for feature in features) == [5, 24, 25, 27, 28, 29]
    base = Base.load(str(run.parent / "base"), layers=[1])
    words = {token: Vocabulary(base).text(token) for token in range(8)}
    unit = next(feature for feature in features if feature["index"] == 5)
    assert [*unit] == [
        *("transcoder_id", "index", "name", "examples_quantiles", "top_logits", "bottom_logits", "act_min", "act_max"),
        *("quantile_values", "histogram", "activation_frequency"),
    ]
    assert [quantile["quantile_name"] for quantile in unit["examples_quantiles"]] == [
        "Top activations",
        "Bottom activations",
    ]
    for quantile, extreme in zip(unit["examples_quantiles"], (max, min), strict=True):
        assert len(quantile["examples"]) == 5
        for example in quantile["examples"]:
            assert [*example] == ["tokens_acts_list", "train_token_ind", "is_repeated_datapoint", "tokens"]
            assert len(example["tokens"]) == len(example["tokens_acts_list"])
            assert example["tokens_acts_list"][example["train_token_ind"]] == extreme(example["tokens_acts_list"])
            assert {token.strip() for token in example["tokens"]} <= {text.strip() for text in words.values()}
        peak = quantile["examples"][0]
        assert peak["tokens_acts_list"][peak["train_token_ind"]] == unit["act_max" if extreme is max else "act_min"]
    # what is said of all tokens, once more, from the text
    ids = torch.tensor(base.tokenizer.encode((run.parent / "held_out.txt").read_text()))[:512].reshape(-1, 16)
    tc = Run(run).load(1)
    values = tc.units(base.activations(ids)[1][0])[..., 5].flatten().detach().numpy()
    assert unit["act_max"] == pytest.approx(values.max(), rel=1e-5)
    assert unit["quantile_values"] == pytest.approx(np.quantile(values, np.linspace(0, 1, 101)), rel=1e-4, abs=1e-6)
    assert sum(unit["histogram"]) == 512
    assert unit["activation_frequency"] == pytest.approx((values > 0).mean(), abs=1 / 512)


def test_the_logits_that_a_unit_moves_are_those_that_the_final_norm_and_the_head_make_of_its_writer(run: Path) -> None:
    _, features = write(run, layer="1", direction=["top:24"], tokens=256)
    model = Base.load(str(run.parent / "base"), layers=[1]).model
    norm, head = model.gpt_neox.final_layer_norm, model.get_output_embeddings()
    words, writers = ["<eos>", *WORDS], Run(run).load(1).writers()
    for feature in features:
        if feature["index"] < 24:
            writer = writers[feature["index"]]
            logits = head.weight[: len(words)] @ ((writer - writer.mean()) * norm.weight)
            order = logits.argsort(descending=True).tolist()
            assert [word.strip() for word in feature["top_logits"]] == [words[token] for token in order]
            assert feature["bottom_logits"] == feature["top_logits"][::-1]


def test_tokens_cannot_become_markup_and_the_page_asks_for_nothing(run: Path) -> None:
    page, features = write(run, layer="2", direction=[f"logit:{SCRIPT}", "top:4"])
    assert f"logit “{html.escape(SCRIPT)}”" in page
    assert "<script" not in page.lower()
    assert "&amp;lt;" in page  # the word "&lt;" itself
    assert SCRIPT in {
        t.strip() for f in features for q in f["examples_quantiles"] for e in q["examples"] for t in e["tokens"]
    }
    assert not re.search(r"https?:|@import|<link(?! rel=\"icon\" href=\"data:,\")|\bsrc=|url\(", page)
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in page


def test_what_cannot_be_seen_is_shown() -> None:
    assert readable("a\n\tb\x00 ") == "a↵⇥b\\x00 "
    assert readable("") == "∅"


def test_a_page_says_how_far_the_layer_can_be_trusted(run: Path) -> None:
    page, _ = write(run, layer="1", direction=["unit:0"])
    assert re.search(r"<dt>FVU on ordinary tokens</dt><dd>0.1650</dd>", page)
    assert re.search(r"<dt>Jacobian cosine</dt><dd>0.850</dd>", page)
    assert "Nothing that was measured speaks against reading these weights" in page
    assert "0.0750 in the median, but 0.9000 or more at one in a hundred" in page
    (run / "evaluation.json").unlink()
    page, _ = write(run, layer="1", direction=["unit:0"])
    assert "has not been measured: run train/evaluate.py" in page


def test_layers_link_to_the_units_that_write_into_them_where_those_have_a_place(run: Path) -> None:
    page, _ = write(run, layer="2", direction=["unit:3"])
    assert "layer_1.html" not in page
    written = re.findall(r"unit (\d+) of layer (\d)", page)
    assert written
    write(run, layer="0-1", direction=[f"unit:{unit}" for unit, _ in written])
    page, _ = write(run, layer="2", direction=["unit:3"])
    hrefs = set(re.findall(r'<a href="(layer_\d\.html#unit-\d+)">', page))
    assert hrefs
    for href in hrefs:
        file, anchor = href.split("#")
        assert f'<section id="{anchor}">' in (run / "pages" / file).read_text()


def test_the_same_set_gives_the_same_bytes(run: Path, tmp_path: Path) -> None:
    asked = {"layer": "0-2", "direction": ["top:2", "logit:a - b"], "tokens": 512}
    for name in ("one", "two"):
        write(run, **asked, output=str(tmp_path / name))
    one, two = ({path: file.sha256 for path, file in list_files(tmp_path / name).items()} for name in ("one", "two"))
    assert one == two
    assert {"layer_0.html", "layer_1.html", "layer_2.html"} <= set(one)


# What a browser shows


def chromium(folder: Path, page: Path, *flags: str) -> str:
    """What Chromium prints of a page, without a network."""
    home = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={folder / 'profile'}")
    offline = ("--proxy-server=127.0.0.1:9", "--disable-background-networking", "--no-first-run")
    command = [str(CHROMIUM), *home, *offline, *flags, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=True).stdout


WIDTHS, HEIGHT = (390, 1200), 3000
PROBE = """
const probe = frame => {
    const of = frame.contentDocument, root = of.documentElement, all = query => [...of.querySelectorAll(query)];
    const sticksOut = e => e.getBoundingClientRect().right > root.clientWidth + 1 && !e.closest(".context");
    return {
        width: root.clientWidth,
        needed: root.scrollWidth,
        wide: all("body *").filter(sticksOut).length,
        loaded: frame.contentWindow.performance.getEntriesByType("resource").map(e => e.name),
        shades: all(".p5, .n5").map(e => getComputedStyle(e).backgroundColor),
        bars: all("svg rect").filter(e => e.getBoundingClientRect().height > 1).length,
        titled: all(".context p span").every(e => e.title.match(/^−?[0-9.e+−]+$/)),
        scripts: all("script").length,
        text: of.body.innerText,
    };
};
onload = () => {
    const seen = JSON.stringify([...document.querySelectorAll("iframe")].map(probe));
    document.title = btoa(unescape(encodeURIComponent(seen)));
};
"""


def framed(page: Path) -> Path:
    """A page that shows another at two widths, one of them narrower than a window of Chromium's may be, side by side.

    Its title says what there is to see in each.
    """
    text = html.escape(page.read_text(encoding="utf-8"))
    size = f'height="{HEIGHT}" style="border: 0; vertical-align: top"'
    frames = "".join(f'<iframe width="{width}" {size} srcdoc="{text}"></iframe>' for width in WIDTHS)
    body = f'<body style="margin: 0; white-space: nowrap">{frames}<script>{PROBE}</script>'
    file = page.with_name("framed.html")
    file.write_text(f'<!DOCTYPE html><meta charset="utf-8">{body}', encoding="utf-8")
    return file


@needs_chromium
@pytest.mark.slow
def test_a_browser_shows_shaded_tokens_and_bars_scrolls_nowhere_and_loads_nothing(run: Path) -> None:
    explore(str(run), ExploreSettings(layer="2", direction=[f"logit:{SCRIPT} -None", "top:2"]))
    page = framed(run / "pages" / "layer_2.html")
    title = re.search(r"<title>([\w+/=]{40,})</title>", chromium(run, page, "--dump-dom"))
    assert title
    for seen, width in zip(json.loads(base64.b64decode(title[1])), WIDTHS, strict=True):
        assert seen["needed"] <= seen["width"] == width
        assert seen["wide"] == 0
        assert seen["loaded"] == []
        assert {*seen["shades"]} == {"rgba(0, 114, 178, 0.6)", "rgba(213, 94, 0, 0.6)"}
        assert seen["bars"] > 20
        assert seen["titled"]
        assert seen["scripts"] == 0
        for words in ("How far to trust this page", f"logit “{SCRIPT}” − “None”", "Eigenvector 1: λ = ", SCRIPT):
            assert words in seen["text"]

    picture = run / "page.png"
    chromium(run, page, f"--window-size={sum(WIDTHS)},{HEIGHT}", f"--screenshot={picture}")
    pixels = imread(picture)[..., :3] * 255
    for shown in np.split(pixels, [WIDTHS[0]], axis=1):
        for color in ((0, 114, 178), (213, 94, 0)):  # the bars', and the darkest shade of each sign on white
            shade = 255 - 0.6 * (255 - np.array(color))
            for expected, least in ((color, 500), (shade, 100)):
                assert (np.abs(shown - expected) < 3).all(-1).sum() > least


@needs_chromium
@pytest.mark.slow
def test_a_page_is_printed(run: Path) -> None:
    explore(str(run), ExploreSettings(layer="2", direction=["top:2"]))
    paper = run / "page.pdf"
    chromium(run, run / "pages" / "layer_2.html", f"--print-to-pdf={paper}")
    assert paper.read_bytes().startswith(b"%PDF")
    assert 2 <= len(re.findall(rb"/Type\s*/Page\b", paper.read_bytes())) <= 12


# What is published, and what is large


@pytest.mark.slow
def test_a_page_of_fifty_directions_stays_under_three_megabytes(tmp_path: Path) -> None:
    run = write_tiny_run(tmp_path / "run", layers=(0, 1), n_inputs=128, n_hidden=64)
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"eval_split": "validation", "bos": "none"}))
    (page,) = explore(str(run), ExploreSettings(layer="1", direction=["top:49", "logit: None - self"], tokens=4096))
    assert page.read_text().count("<section") == 50
    assert page.read_text().count('<div class="context">') == 50 * (1 + EIGENVECTORS) * 10
    assert page.stat().st_size < 3e6


@pytest.mark.parametrize("said", [{"eval_split": None}, {"trust_remote_code": True, "eval_split": "validation"}])
def test_pages_of_a_run_that_names_no_text_or_trusts_code(tmp_path: Path, monkeypatch, said: dict[str, Any]) -> None:
    """The first is refused before anything is asked for; what a run says does not let code run."""
    run, seen = write_tiny_run(tmp_path / "run"), []
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe | said))
    monkeypatch.setattr(publish, "check_publishable", lambda *_, **__: None)
    monkeypatch.setattr(publish.HubRepository, "answers", lambda _hub: False)

    def stop(_run: Run, _asked: list[str], held_out: Recipe, _device: torch.device) -> None:
        seen.append(held_out.trust_remote_code)
        raise UserError("no further")

    monkeypatch.setattr(publish, "read_set", stop)
    with pytest.raises(UserError, match=r"no further|run the fit's command again with an --eval_split"):
        publish.publish(Run(run), publish.Publication(repo_id="tester/set", with_pages=True, dry_run=True))
    assert seen == ([] if said["eval_split"] is None else [False])


@pytest.mark.slow
def test_pages_are_published_beside_the_card_which_links_to_them(
    hub: HubServer, publisher: Publisher, run: Path, tmp_path: Path
) -> None:
    command = (run, "--repo_id", "tester/set", "--base_model", "owner/words", "--allow_partial")
    done = publisher.command(*command, "--with_pages")
    assert done.returncode == 0, done.output
    pages = {f"pages/layer_{layer}.html" for layer in range(3)}
    sent = hub.files("tester/set", "main")
    assert {path for path in sent if path.startswith("pages/")} == pages
    card = (run / "repository" / "README.md").read_text()
    assert all(f"]({page})" in card for page in pages)
    assert "├── pages/" in card
    text = (run / "repository" / "pages" / "layer_1.html").read_text()
    assert "<h1>Layer 1 of words</h1>" in text
    assert "held_out.txt" in text
    assert str(tmp_path) not in text
    assert text.count("<section") == 8

    place = (
        "--base",
        run.parent / "base",
        "--dataset",
        run.parent / "train.txt",
        "--split",
        run.parent / "held_out.txt",
    )
    asked = ("tester/set", "--layer", 1, "--direction", "unit:3", "--tokens", 256, "--output", tmp_path / "read")
    read_again = publisher.server.start(main, [*asked, *place], environment=publisher.environment).wait()
    assert read_again.stdout == f"{tmp_path / 'read' / 'layer_1.html'}\n", read_again.output
    assert "<h2>unit 3</h2>" in (tmp_path / "read" / "layer_1.html").read_text()

    without = publisher.command(*command)
    assert without.returncode == 0, without.output
    assert not pages & set(hub.files("tester/set", "main"))
    assert "pages/" not in (run / "repository" / "README.md").read_text()
