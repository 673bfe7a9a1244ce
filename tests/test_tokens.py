"""Token batches against a plain loop: packing, padding, shuffling, resuming, failing, sharing among processes."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
import threading
from collections.abc import Iterator
from itertools import accumulate, islice
from pathlib import Path

import pytest
import torch
from forking import ForkServer
from tokenizers import Tokenizer, models
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from bilinear_tc.train.errors import UserError
from bilinear_tc.train.text import batches as tokens
from bilinear_tc.train.text.batches import TokenBatch, TokenBatches
from bilinear_tc.train.text.documents import Documents, TextError
from bilinear_tc.train.text.source import SharedBatches

QUICKSTART = Path(__file__).resolve().parent.parent / "train" / "quickstart"


class Listed:
    """Documents from a list; one that is an exception is raised when its turn comes."""

    def __init__(self, texts: list[str | Exception]) -> None:
        self.texts, self.position = texts, 0

    def __iter__(self) -> Iterator[str]:
        while self.position < len(self.texts):
            if isinstance(text := self.texts[self.position], Exception):
                raise text
            self.position += 1
            yield text
        self.position = 0

    def state_dict(self) -> dict:
        return {"position": self.position}

    def load_state_dict(self, state: dict) -> None:
        self.position = state["position"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return PreTrainedTokenizerFast.from_pretrained(QUICKSTART)


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Real text of very different lengths, with a character outside ASCII, spaces at the ends and an empty document."""
    library = "".join(islice(Documents("python-stdlib", split="validation"), 20))
    lengths = (9000, 9, 200, 4000, 1500) * 4 + (1, 2400)
    return [
        "",
        " über \n",
        *(library[end - length : end] for end, length in zip(accumulate(lengths), lengths, strict=True)),
    ]


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many chunks and pieces out of little text, so that they end everywhere in batches."""
    monkeypatch.setattr(tokens, "CHUNK_CHARACTERS", 2500)
    monkeypatch.setattr(tokens, "PIECE_CHARACTERS", 2000)


def packed(texts: list[str], tokenizer: PreTrainedTokenizerBase, seq_len: int) -> torch.Tensor:
    """[sequences, seq_len]: each document's tokens and one end of text, one after another, cut without padding."""
    stream: list[int] = []
    for text in texts:
        if text:
            stream += tokenizer(text, verbose=False, add_special_tokens=not isinstance(tokenizer, ByT5Tokenizer))[
                "input_ids"
            ]
            stream.append(tokenizer.eos_token_id)
    return torch.tensor(stream[: len(stream) // seq_len * seq_len]).view(-1, seq_len)


def padded(texts: list[str], tokenizer: PreTrainedTokenizerBase, seq_len: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[documents, seq_len] ids and mask: each document truncated or padded with the end of text."""
    rows, masks = [], []
    for text in texts:
        if text:
            ids = tokenizer(text, verbose=False)["input_ids"][:seq_len]
            rows.append(ids + [tokenizer.eos_token_id] * (seq_len - len(ids)))
            masks.append([True] * len(ids) + [False] * (seq_len - len(ids)))
    return torch.tensor(rows), torch.tensor(masks)


def joined(batches: Iterator[TokenBatch], count: int | None = None) -> torch.Tensor:
    """All sequences of the next `count` batches, [sequences, seq_len]."""
    return torch.cat([batch.input_ids for batch in islice(batches, count)])


def stored(state: dict, weights_only: bool = True) -> dict:
    """The state as it comes back from a file."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=weights_only)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_packed_batches_are_those_of_a_plain_loop(texts, tokenizer, workers: int, small_chunks) -> None:
    expected = packed(texts, tokenizer, 32)
    with TokenBatches(Listed(texts), tokenizer, seq_len=32, batch_size=8, workers=workers, epochs=1) as batches:
        read = list(batches)
    assert all(batch.mask is None and batch.input_ids.dtype == torch.int64 for batch in read)
    assert [len(batch) for batch in read] == [8] * (len(expected) // 8) + [len(expected) % 8] * (len(expected) % 8 > 0)
    assert torch.equal(joined(iter(read)), expected)


@pytest.mark.parametrize("workers", [0, 2])
def test_unpacked_batches_truncate_pad_and_mask(texts, tokenizer, workers: int, small_chunks) -> None:
    ids, mask = padded(texts, tokenizer, 48)
    assert mask.all(1).any()
    assert not mask.all(1).all()
    with TokenBatches(
        Listed(texts), tokenizer, seq_len=48, batch_size=5, pack=False, workers=workers, epochs=1
    ) as batches:
        read = list(batches)
    assert torch.equal(joined(iter(read)), ids)
    assert torch.equal(torch.cat([batch.mask for batch in read]), mask)


def test_real_documents_whole_and_truncated(tokenizer) -> None:
    """Python's library: documents of up to hundreds of thousands of characters, truncated ones read in part only."""
    texts = list(islice(Documents("python-stdlib", split="validation"), 30))
    documents = Listed(texts)
    with TokenBatches(documents, tokenizer, seq_len=128, batch_size=1, workers=0, epochs=1) as batches:
        assert torch.equal(joined(batches), packed(texts, tokenizer, 128))
    ids, mask = padded(texts, tokenizer, 128)
    with TokenBatches(documents, tokenizer, seq_len=128, batch_size=30, pack=False, workers=0, epochs=1) as batches:
        (batch,) = batches
    assert torch.equal(batch.input_ids, ids)
    assert torch.equal(batch.mask, mask)


def test_a_document_whose_first_characters_give_few_tokens_is_read_further(tokenizer) -> None:
    texts = [" " * 5000 + "def f(x):\n    return x\n" * 50]
    ids, _ = padded(texts, tokenizer, 64)
    with TokenBatches(Listed(texts), tokenizer, seq_len=64, batch_size=1, pack=False, workers=0, epochs=1) as batches:
        assert torch.equal(next(batches).input_ids, ids)


def test_tokenizers_without_a_fast_backend(texts) -> None:
    slow = ByT5Tokenizer()
    short = [text[:300] for text in texts]
    with TokenBatches(Listed(short), slow, seq_len=16, batch_size=4, workers=0, epochs=1) as batches:
        read = joined(batches)
    assert torch.equal(read, packed(short, slow, 16)[: len(read)])


def test_the_users_tokenizer_is_left_as_it_was(tokenizer) -> None:
    mine = PreTrainedTokenizerFast.from_pretrained(QUICKSTART)
    truncated = mine("one two three four five six", truncation=True, max_length=3)["input_ids"]
    with TokenBatches(Listed(["one two three " * 40]), mine, seq_len=4, batch_size=2, workers=0, epochs=1) as batches:
        assert torch.equal(joined(batches, 4), packed(["one two three " * 40], tokenizer, 4)[:8])
    assert mine.backend_tokenizer.truncation["max_length"] == 3
    assert mine("one two three four five six", truncation=True, max_length=3)["input_ids"] == truncated


def test_the_text_starts_again_with_one_warning(texts, tokenizer, caplog, small_chunks) -> None:
    expected = packed(texts * 3, tokenizer, 32)
    with (
        caplog.at_level(logging.WARNING),
        TokenBatches(Listed(texts), tokenizer, seq_len=32, batch_size=8, workers=0) as batches,
    ):
        assert torch.equal(joined(batches, len(expected) // 8), expected[: len(expected) // 8 * 8])
    assert ["read again" in record.message for record in caplog.records] == [True]


def test_epochs_end_the_iteration_for_good(texts, tokenizer) -> None:
    with TokenBatches(Listed(texts), tokenizer, seq_len=32, batch_size=8, workers=0, epochs=2) as batches:
        assert len(joined(batches)) == len(packed(texts * 2, tokenizer, 32))
        for _ in range(2):
            with pytest.raises(StopIteration):
                next(batches)
        state = stored(batches.state_dict())
        batches.load_state_dict(state)
        assert list(batches) == []


def test_shuffled_passes_hold_every_sequence_once(texts, tokenizer, small_chunks) -> None:
    """A pass is a permutation, in which none comes earlier than `shuffle_buffer` places before its own."""
    expected = packed(texts, tokenizer, 32)
    orders = []
    for seed in (0, 0, 1):
        with TokenBatches(
            Listed(texts), tokenizer, seq_len=32, batch_size=1, shuffle_buffer=20, seed=seed, workers=0, epochs=1
        ) as batches:
            read = joined(batches)
        assert sorted(read.tolist()) == sorted(expected.tolist())
        for place, sequence in enumerate(read[:-20]):
            assert (expected[: place + 21] == sequence).all(1).any()
        orders.append(read)
    assert torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[0], orders[2])
    assert not torch.equal(orders[0][:20], expected[:20])


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("shuffle_buffer", [0, 17, 10_000])
def test_every_position_resumes_bit_for_bit(texts, tokenizer, pack: bool, shuffle_buffer: int, small_chunks) -> None:
    """Over the end of the first pass and to the end of the second, with the number of workers changed."""

    def batches(workers: int, prefetch: int) -> TokenBatches:
        return TokenBatches(
            Listed(texts),
            tokenizer,
            seq_len=40,
            batch_size=7,
            pack=pack,
            shuffle_buffer=shuffle_buffer,
            seed=3,
            workers=workers,
            prefetch=prefetch,
            epochs=2,
        )

    with batches(workers=0, prefetch=3) as unbroken:
        read, states = [], [stored(unbroken.state_dict())]
        for batch in unbroken:
            read.append(batch)
            states.append(stored(unbroken.state_dict(), weights_only=len(read) % 2 == 0))
    in_pass = len(packed(texts, tokenizer, 40) if pack else padded(texts, tokenizer, 40)[0]) // 7
    middle, end = in_pass // 2, len(read)
    for place in {0, 1, middle, *range(max(0, in_pass - 3), in_pass + 2), *range(max(0, end - 4), end + 1)}:
        with batches(workers=2 if place == middle else 0, prefetch=1) as resumed:
            resumed.load_state_dict(states[place])
            for expected, batch in zip(read[place:][:7], islice(resumed, 7), strict=True):
                assert torch.equal(batch.input_ids, expected.input_ids)
                assert pack or torch.equal(batch.mask, expected.mask)
    with batches(workers=0, prefetch=8) as going_back:
        joined(going_back, 3)
        going_back.load_state_dict(states[1])
        assert torch.equal(joined(going_back, 2), torch.cat([batch.input_ids for batch in read[1:3]]))


RESUME = """
import sys, torch
from transformers import PreTrainedTokenizerFast
from bilinear_tc.train.text.documents import Documents
from bilinear_tc.train.text.batches import TokenBatches

folder, base = sys.argv[1:]
batches = TokenBatches(
    Documents(folder + "/*.jsonl"), PreTrainedTokenizerFast.from_pretrained(base),
    seq_len=32, batch_size=4, shuffle_buffer=30, workers=2, epochs=3,
)
batches.load_state_dict(torch.load(folder + "/state.pt", weights_only=True))
torch.save(torch.cat([next(batches).input_ids for _ in range(20)]), folder + "/read.pt")
"""


@pytest.mark.slow
def test_a_fresh_process_resumes_and_ends_without_being_closed(tmp_path: Path, texts, tokenizer) -> None:
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    documents = Documents(f"{tmp_path}/*.jsonl")
    with TokenBatches(
        documents, tokenizer, seq_len=32, batch_size=4, shuffle_buffer=30, workers=0, epochs=3
    ) as batches:
        joined(batches, 30)
        torch.save(batches.state_dict(), tmp_path / "state.pt")
        expected = joined(batches, 20)
    command = [sys.executable, "-c", RESUME, str(tmp_path), str(QUICKSTART)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "parallelism" not in done.stderr
    assert torch.equal(torch.load(tmp_path / "read.pt"), expected)


@pytest.mark.parametrize("workers", [0, 2])
def test_what_was_read_before_a_failure_is_handed_out(texts, tokenizer, workers: int, small_chunks) -> None:
    broken = [*texts[:5], TextError("line 3 of b.jsonl is not JSON"), *texts[5:]]
    expected = packed(texts[:5], tokenizer, 32)
    threads = threading.active_count()
    with TokenBatches(Listed(broken), tokenizer, seq_len=32, batch_size=1, workers=workers) as batches:
        assert torch.equal(joined(batches, len(expected)), expected)
        for _ in range(2):
            with pytest.raises(TextError, match="line 3"):
                next(batches)
        state = stored(batches.state_dict())
    assert threading.active_count() == threads
    mended = Listed(broken[:5] + broken[6:])
    with TokenBatches(mended, tokenizer, seq_len=32, batch_size=1, workers=0, epochs=1) as batches:
        batches.load_state_dict(state)
        assert torch.equal(joined(batches), packed(texts, tokenizer, 32)[len(expected) :])


@pytest.mark.parametrize("pack", [True, False])
def test_too_little_text_to_fit_on_is_said_and_of_held_out_text_all_is_used(tokenizer, pack: bool) -> None:
    documents = Listed(["a b c d e", "f g h i"])
    batches = TokenBatches(documents, tokenizer, seq_len=8, batch_size=64, pack=pack, workers=0)
    with batches, pytest.raises(TextError, match=r"holds \d sequences of 8 tokens, fewer than one batch of 64"):
        next(batches)
    with TokenBatches(documents, tokenizer, seq_len=8, batch_size=64, pack=pack, workers=0, epochs=1) as batches:
        assert len(joined(batches)) == 1 if pack else 2
    with (
        TokenBatches(documents, tokenizer, seq_len=800, batch_size=64, workers=0, epochs=1) as batches,
        pytest.raises(TextError, match=r"holds 0 sequences of 800 tokens"),
    ):
        next(batches)


def test_a_failing_tokenizer_is_said(tokenizer) -> None:
    """Half a surrogate pair cannot be tokenized; `Documents` never yields one."""
    for workers in (0, 1):
        batches = TokenBatches(Listed(["\ud800"]), tokenizer, seq_len=4, batch_size=1, workers=workers)
        with batches, pytest.raises(TextError, match="tokenizer failed on a document"):
            next(batches)


def test_closing_pauses_the_iteration(texts, tokenizer, small_chunks) -> None:
    expected = packed(texts, tokenizer, 32)
    batches = TokenBatches(Listed(texts), tokenizer, seq_len=32, batch_size=4, workers=1)
    threads = threading.active_count()
    for start in (0, 12):
        assert torch.equal(joined(batches, 3), expected[start : start + 12])
        batches.close()
        batches.close()
        assert threading.active_count() == threads


@pytest.mark.parametrize(
    "arguments",
    [{"seq_len": 0}, {"batch_size": 0}, {"shuffle_buffer": -1}, {"workers": -1}, {"prefetch": 0}, {"epochs": 0}],
)
def test_impossible_arguments_are_refused(tokenizer, arguments: dict[str, int]) -> None:
    (name,) = arguments
    with pytest.raises(ValueError, match=f"{name} must be at least"):
        TokenBatches(Listed(["a"]), tokenizer, **{"seq_len": 8, "batch_size": 2} | arguments)


def test_tokenizers_without_an_end_of_text_are_refused() -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(QUICKSTART / "tokenizer.json"))
    with pytest.raises(UserError, match="must have an end-of-text token"):
        TokenBatches(Listed(["a"]), tokenizer, seq_len=8, batch_size=2)


def test_positions_of_other_sequences_are_refused(texts, tokenizer) -> None:
    state = TokenBatches(Listed(texts), tokenizer, seq_len=8, batch_size=2).state_dict()
    with pytest.raises(UserError, match="saved with seq_len 8, but seq_len is 16 now"):
        TokenBatches(Listed(texts), tokenizer, seq_len=16, batch_size=2).load_state_dict(state)
    with pytest.raises(UserError, match="saved with pack True, but pack is False now"):
        TokenBatches(Listed(texts), tokenizer, seq_len=8, batch_size=2, pack=False).load_state_dict(state)


def test_positions_in_other_text_are_refused(tmp_path: Path, tokenizer) -> None:
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("text " * 100)
    here, there = (TokenBatches(Documents(f"{tmp_path}/{n}.txt"), tokenizer, seq_len=8, batch_size=2) for n in "ab")
    with pytest.raises(TextError, match="belongs to other text"):
        there.load_state_dict(here.state_dict())


def test_one_process_shares_with_nobody(texts, tokenizer) -> None:
    batches = TokenBatches(Listed(texts), tokenizer, seq_len=32, batch_size=3, workers=0)
    with SharedBatches(batches, torch.device("cpu")) as shared:
        assert torch.equal(next(shared).input_ids, packed(texts, tokenizer, 32)[:3])
        state = stored(shared.state_dict())
        expected = next(shared).input_ids
        shared.load_state_dict(state)
        assert torch.equal(next(shared).input_ids, expected)
    with pytest.raises(ValueError, match="must be given on the main process"):
        SharedBatches(None, torch.device("cpu"))


def share_batches() -> None:
    """A script: reads the cases of a folder with the other processes, and saves what this one was given."""
    folder, base = Path(sys.argv[1]), sys.argv[2]
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
    read: dict[str, tuple[list[tuple[torch.Tensor, torch.Tensor | None]], str | None, torch.Tensor | None]] = {}
    for name, arguments in json.loads((folder / "cases.json").read_text()).items():
        documents = Documents(str(folder / f"{name.split('-')[0]}.jsonl"))
        batches = TokenBatches(documents, tokenizer, workers=0, **arguments) if rank == 0 else None
        with SharedBatches(batches, torch.device("cpu")) as shared:
            shares, ended, state, again = [], None, None, None
            try:
                for share in shared:
                    shares.append((share.input_ids, share.mask))
                    if len(shares) == 2:
                        state = shared.state_dict()
            except Exception as error:
                ended = f"{type(error).__name__}: {error}"
            if state is not None:
                shared.load_state_dict(state)
                again = next(shared).input_ids
            read[name] = (shares, ended, again)
    torch.save(read, folder / f"read-{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_processes_share_every_batch_and_end_together(
    fork_server: ForkServer, tmp_path: Path, texts, tokenizer
) -> None:
    """Two processes: batches of 7 and 5 leave them uneven shares, batches of 1 leave one of them none."""
    processes = 2
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    (tmp_path / "good.jsonl").write_text("".join(lines))
    (tmp_path / "bad.jsonl").write_text("".join([*lines[:12], "{\n"]))
    cases = {
        "good-packed": {"seq_len": 32, "batch_size": 7, "epochs": 1},
        "good-padded": {"seq_len": 32, "batch_size": 5, "pack": False, "epochs": 1},
        "good-few": {"seq_len": 640, "batch_size": 1, "epochs": 1},
        "bad": {"seq_len": 32, "batch_size": 8},
    }
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    running = fork_server.start_processes(processes, share_batches, [tmp_path, QUICKSTART])
    ended = [process.wait() for process in running]
    assert [each.returncode for each in ended] == [0] * processes, ended[0].stderr
    read = [torch.load(tmp_path / f"read-{rank}.pt") for rank in range(processes)]

    ids, mask = padded(texts, tokenizer, 32)
    expected = {
        "good-packed": (packed(texts, tokenizer, 32), None),
        "good-padded": (ids, mask),
        "good-few": (packed(texts, tokenizer, 640), None),
        "bad": (packed(texts[:12], tokenizer, 32), None),
    }
    for name, arguments in cases.items():
        size = arguments["batch_size"]
        shares, endings, again = zip(*(read[rank][name] for rank in range(processes)), strict=True)
        # what does not fill a batch comes as a smaller one, unless the text fails before its end
        count = len(expected[name][0]) // size if name == "bad" else -(-len(expected[name][0]) // size)
        assert [len(of_rank) for of_rank in shares] == [count] * processes
        for step in range(count):
            sizes = [len(of_rank[step][0]) for of_rank in shares]
            assert max(sizes) - min(sizes) <= 1
            for whole, part in zip(expected[name], range(2), strict=True):
                if whole is None:
                    assert all(of_rank[step][part] is None for of_rank in shares)
                else:
                    together = torch.cat([of_rank[step][part] for of_rank in shares])
                    assert torch.equal(together, whole[step * size : (step + 1) * size])
        assert torch.equal(torch.cat(again), expected[name][0][2 * size : 3 * size])
        if name == "bad":
            assert endings[0].startswith("TextError: line 13 of ")
            assert "is not JSON" in endings[0]
        assert endings == (endings[0] if name == "bad" else None,) * processes


def test_a_tokenizer_that_adds_its_own_end_of_text_adds_no_second_one_and_none_at_a_seam(monkeypatch) -> None:
    monkeypatch.setattr(tokens, "PIECE_CHARACTERS", 40)
    slow = ByT5Tokenizer()
    long = "a line of some length\n" * 6
    with TokenBatches(Listed([long, "short"]), slow, seq_len=1, batch_size=1, workers=0, epochs=1) as batches:
        read = joined(batches).flatten().tolist()
    assert read.count(slow.eos_token_id) == 2
    assert slow.decode([token for token in read if token != slow.eos_token_id]) == long + "short"


def test_an_unknown_word_that_is_the_end_of_text_is_not_taken_for_one(monkeypatch) -> None:
    """As where one token serves as both, and a word beyond the vocabulary ends a document."""
    words = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<e>": 0, "b": 1}, unk_token="<e>")),
        eos_token="<e>",
        unk_token="<e>",
    )
    with TokenBatches(Listed(["b", "zzz"]), words, seq_len=1, batch_size=1, workers=0, epochs=1) as batches:
        assert joined(batches).flatten().tolist() == [1, 0, 0, 0]
