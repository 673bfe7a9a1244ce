"""What each sequence starts with: found out from the tokenizer, put in place, recorded, and kept to."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import yaml
from bases import tiny_llama, write_base_of_words
from fitting import TinyFit, assert_same_layers
from test_tokens import QUICKSTART, Listed, joined, small_chunks, stored, texts  # noqa: F401
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from bilinear_tc.train import evaluate
from bilinear_tc.train.errors import UserError
from bilinear_tc.train.measuring.evaluation import Evaluation
from bilinear_tc.train.recipe import Recipe
from bilinear_tc.train.run import Run
from bilinear_tc.train.text.batches import TokenBatches
from bilinear_tc.train.text.encode import Encoder
from bilinear_tc.train.text.source import open_batches, open_held_out, settled_bos

BOS, EOS = 1, 0
WORDS = ["a", "b", "c", "d", "the", "of"]


def adding(tokenizer: PreTrainedTokenizerFast, template: str, bos: str | None = None) -> PreTrainedTokenizerFast:
    """The tokenizer, which from now on makes of each text what the template says; perhaps with a named BOS."""
    special = {token: tokenizer.convert_tokens_to_ids(token) for token in template.split() if token != "$A"}
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=[*special.items()])
    tokenizer.bos_token = bos
    return tokenizer


def quickstarts(template: str | None = None, bos: str | None = None) -> PreTrainedTokenizerFast:
    """The quickstart's tokenizer; with a template, whose `<bos>` is token 2048, one that adds its tokens."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(QUICKSTART)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<bos>", "<sop>"]})
    return tokenizer if template is None else adding(tokenizer, template, bos)


class SlowWithBos(ByT5Tokenizer):
    """Written in Python, and its BOS has no name."""

    def build_inputs_with_special_tokens(self, token_ids_0, token_ids_1=None):
        return [2, *super().build_inputs_with_special_tokens(token_ids_0, token_ids_1)]


EOT = "<|endoftext|>"
TOKENIZERS = {
    "none": (lambda: quickstarts(), []),
    "named": (lambda: quickstarts("<bos> $A", "<bos>"), [2048]),
    "without a name": (lambda: quickstarts("<bos> $A"), [2048]),
    "the end of text": (lambda: quickstarts(f"{EOT} $A"), [0]),
    "and an end": (lambda: quickstarts(f"<bos> $A {EOT}", "<bos>"), [2048]),
    "and another end": (lambda: quickstarts("<bos> $A <sop>"), [2048]),
    "an end alone": (lambda: quickstarts(f"$A {EOT}"), []),
    "two": (lambda: quickstarts("<bos> <sop> $A"), [2048, 2049]),
    "slow": (SlowWithBos, [2]),
    "slow without": (ByT5Tokenizer, []),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_auto_is_what_the_tokenizer_puts_before_a_text(kind: str) -> None:
    make, expected = TOKENIZERS[kind]
    tokenizer = make()
    assert tokenizer("some text")["input_ids"][: len(expected)] == expected
    assert Encoder(tokenizer).bos == expected
    assert settled_bos(Recipe(), tokenizer) == (",".join(map(str, expected)) or "none")
    assert settled_bos(Recipe(bos="none"), tokenizer) == "none"
    assert settled_bos(Recipe(bos="7"), tokenizer) == "7"


def started(texts: list[str], tokenizer: PreTrainedTokenizerBase, seq_len: int, bos: list[int]) -> torch.Tensor:  # noqa: F811
    """[sequences, seq_len] by a plain loop that moves token after token."""
    stream = []
    for text in filter(None, texts):
        stream += [*tokenizer(text, verbose=False)["input_ids"], tokenizer.eos_token_id]
    sequences = []
    while len(stream) >= seq_len:
        sequence = [] if stream[: len(bos)] == bos else list(bos)
        while len(sequence) < seq_len:
            sequence.append(stream.pop(0))
        sequences.append(sequence)
    return torch.tensor(sequences)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("template", ["<bos> $A", "<bos> <sop> $A", f"{EOT} $A"])
def test_packed_sequences_start_with_it_and_no_token_is_lost(texts, template: str, workers: int) -> None:  # noqa: F811
    tokenizer = quickstarts(template)
    bos = Encoder(tokenizer).bos
    settings = {"seq_len": 16, "batch_size": 8, "epochs": 1, "workers": workers}
    with TokenBatches(Listed(texts), tokenizer, **settings, bos=bos) as batches:
        read = joined(batches)
    assert torch.equal(read, started(texts, tokenizer, 16, bos))
    assert read[:, : len(bos)].tolist() == [bos] * len(read)
    assert (read[:, len(bos) :] == bos[0]).any()  # where a document begins within a sequence, as people tokenize it


@pytest.mark.usefixtures("small_chunks")
def test_without_it_the_stream_is_cut_as_it_comes(texts) -> None:  # noqa: F811
    tokenizer = quickstarts("<bos> $A")
    with TokenBatches(Listed(texts), tokenizer, seq_len=16, batch_size=8, workers=0, epochs=1) as batches:
        assert torch.equal(joined(batches), started(texts, tokenizer, 16, []))


def test_documents_cut_to_one_sequence_start_with_it_once() -> None:
    texts = ["one two three four five six seven", "one"]  # noqa: F811
    for tokenizer in (quickstarts(), quickstarts("<bos> $A")):
        documents = Listed(texts)
        settings = {"seq_len": 5, "batch_size": 2, "pack": False, "workers": 0, "epochs": 1}
        with TokenBatches(documents, tokenizer, **settings, bos=[2048]) as batches:
            (batch,) = batches
        ids = [[2048, *tokenizer(text, add_special_tokens=False)["input_ids"]][:5] for text in texts]
        assert batch.mask.tolist() == [[True] * len(row) + [False] * (5 - len(row)) for row in ids]
        assert batch.input_ids.tolist() == [row + [0] * (5 - len(row)) for row in ids]


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("shuffle_buffer", [0, 17])
def test_every_position_resumes_bit_for_bit(texts, shuffle_buffer: int) -> None:  # noqa: F811
    tokenizer = quickstarts("<bos> $A")

    def batches(bos: list[int]) -> TokenBatches:
        size = {"seq_len": 64, "batch_size": 7, "epochs": 2}
        return TokenBatches(Listed(texts), tokenizer, **size, shuffle_buffer=shuffle_buffer, workers=0, bos=bos)

    with batches([2048]) as unbroken:
        read, states = [], [stored(unbroken.state_dict())]
        for batch in unbroken:
            read.append(batch.input_ids)
            states.append(stored(unbroken.state_dict()))
    for place in range(0, len(read), 5):
        with batches([2048]) as resumed:
            resumed.load_state_dict(states[place])
            assert torch.equal(joined(resumed, 3), torch.cat(read[place : place + 3]))
    with pytest.raises(UserError, match=r"saved with bos \[2048\], but bos is \[\] now"):
        batches([]).load_state_dict(states[0])
    del states[0]["bos"]  # as an earlier version wrote it
    batches([]).load_state_dict(states[0])
    with pytest.raises(UserError, match=r"saved with bos \[\], but bos is \[2048\] now"):
        batches([2048]).load_state_dict(states[0])


def test_sequences_with_no_room_for_text_are_refused() -> None:
    with pytest.raises(UserError, match="seq_len must be at least 2, since each sequence starts with bos, got 1"):
        TokenBatches(Listed(["a"]), quickstarts(), seq_len=1, batch_size=1, bos=[5])


@pytest.mark.parametrize(("value", "kept"), [(2, "2"), ("151331,151333", "151331,151333"), ("none", "none")])
def test_settings_of_it(value: object, kept: str) -> None:
    assert Recipe(bos=value).bos == kept
    for wrong in ("yes", "-1", "", "1,", None):
        with pytest.raises(UserError, match="bos must be"):
            Recipe(bos=wrong)


def test_a_run_from_before_the_setting_had_none_and_goes_on_so(tmp_path: Path) -> None:
    run = Run(tmp_path)
    before = {name: value for name, value in Recipe().to_dict().items() if name != "bos"}
    run.write_root(before)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step_00000001.pt").touch()
    assert run.recipe.bos == "none"
    assert run.continued(Recipe()) == Recipe(bos="none")
    assert run.continued(Recipe(resume=False)).bos == "auto"
    with pytest.raises(UserError, match="bos was none, is 2"):
        run.continued(Recipe(bos="2"))
    run.write_root(before | {"bos": "2"})
    assert run.continued(Recipe()).bos == run.recipe.bos == "2"
    with pytest.raises(UserError, match="bos was 2, is none"):
        run.continued(Recipe(bos="none"))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A Llama with a tokenizer of words that puts a BOS before each text."""
    folder = write_base_of_words(tmp_path / "base", tiny_llama(), ["<s>", *WORDS], Whitespace())
    adding(PreTrainedTokenizerFast.from_pretrained(folder), "<s> $A", "<s>").save_pretrained(folder)
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    for name, count in (("train", 200), ("val", 60)):
        documents = [" ".join(WORDS[i] for i in torch.randint(6, (50,), generator=generator)) for _ in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return tmp_path


def test_the_text_fitted_on_and_the_text_held_out_start_alike(base: Path, text: Path) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
    recipe = Recipe(dataset=str(text / "train.jsonl"), eval_split=str(text / "val.jsonl"), seq_len=8, batch_size=4)
    for bos, starts in (("auto", True), ("none", False), ("3", False)):
        asked = dataclasses.replace(recipe, bos=bos)
        cpu = torch.device("cpu")
        for opened in (open_batches(asked, tokenizer, cpu), open_held_out(asked, tokenizer, cpu, 4)):
            with opened as batches:
                first = joined(batches, 20)[:, 0]
            assert (first == BOS).all() == starts
            assert bos != "3" or (first == 3).all()


@pytest.mark.slow
def test_a_fit_records_it_and_resumes_and_is_measured_with_it(tiny_fit: TinyFit, base: Path, text: Path) -> None:
    flags = ("--base", base, "--dataset", text / "train.jsonl", "--eval_split", text / "val.jsonl", "--layers", 1)
    sizes = ("--seq_len", 8, "--batch_size", 8, "--init_tokens", 256, "--eval_tokens", 512, "--max_steps", 3)
    whole, broken = text / "whole", text / "broken"
    assert tiny_fit.run(whole, *flags, *sizes).returncode == 0
    for place in ("recipe.yaml", "layer_1/config.yaml"):
        assert yaml.safe_load((whole / place).read_text())["bos"] == str(BOS)
    stop = ("die_at", "os.rename", "step_00000003", "0")
    assert tiny_fit.run(broken, *flags, *sizes, "--checkpoint_every", 1, sabotage=stop).returncode < 0
    resumed = tiny_fit.run(broken, *flags, *sizes, "--checkpoint_every", 1)
    assert (resumed.returncode, "resuming" in resumed.stdout) == (0, True), resumed.stderr
    assert yaml.safe_load((broken / "recipe.yaml").read_text())["bos"] == str(BOS)
    assert_same_layers(broken, whole)

    fitted = Run(whole).evaluation
    measured = evaluated(tiny_fit, whole)
    assert fitted is not None
    assert measured.layers[1].fvu == pytest.approx(fitted.layers[1].fvu, rel=1e-3)
    assert (measured.tokens, measured.loss_tokens) == (512, 512 // 8 * 7)  # the first after a BOS is predicted too
    settings = yaml.safe_load((whole / "recipe.yaml").read_text())
    del settings["bos"]  # as an earlier version wrote it
    (whole / "recipe.yaml").write_text(yaml.safe_dump(settings))
    other = evaluated(tiny_fit, whole)
    assert abs(other.base_ce - measured.base_ce) > 1e-3
    assert other.layers[1].fvu != pytest.approx(fitted.layers[1].fvu, rel=1e-3)


def evaluated(tiny_fit: TinyFit, run: Path) -> Evaluation:
    """What train/evaluate.py says of a run."""
    finished = tiny_fit.server.start(evaluate.main, ["--transcoders", str(run)]).wait()
    assert finished.returncode == 0, finished.stderr
    evaluation = Run(run).evaluation
    assert evaluation is not None
    return evaluation
