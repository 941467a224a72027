"""Corpus, tokenizer, data sets on disk and batches, with the real megatron-core."""

from __future__ import annotations

import argparse
import errno
import json
import math
import os
import random
import resource
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fluid_npu.train.data import build as building
from fluid_npu.train.data import corpus as corpora
from fluid_npu.train.data.build import build, ensure_default, info, load_tokenizer, unigram_entropy
from fluid_npu.train.data.cli import add_data_parser
from fluid_npu.train.data.corpus import default_corpus, read_inputs, split_document
from fluid_npu.train.data.dataset import BatchIterator, build_datasets
from fluid_npu.train.data.errors import DataError
from fluid_npu.train.data.tokenizer import Tokenizer, train_tokenizer

pytestmark = pytest.mark.host

VOCAB = 400
SEQ = 32


def some_text(seed: int, words: int = 3000) -> str:
    """Made-up prose: words of a fixed list, so that a small vocabulary can be trained on it."""
    draw = random.Random(seed)
    alphabet = "abcdefghijklmnopqrstuvwxyz"
    lexicon = ["".join(random.Random(i).choices(alphabet, k=2 + i % 7)) for i in range(300)]
    return "".join(draw.choice(lexicon) + (".\n" if i % 12 == 11 else " ") for i in range(words))


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("texts")
    for i in range(40):
        (root / f"{i:02d}.txt").write_text(some_text(i, 400))
    return root


@pytest.fixture(scope="module")
def built(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    prefix = tmp_path_factory.mktemp("built") / "my.text"
    build([texts], prefix, VOCAB)
    return prefix


@pytest.fixture
def copy(built: Path, tmp_path: Path) -> Path:
    """A data set that a test may break."""
    for suffix in building.SUFFIXES:
        shutil.copy(f"{built}{suffix}", tmp_path / f"copy{suffix}")
    return tmp_path / "copy"


def data_command(*words: str) -> int:
    parser = argparse.ArgumentParser()
    add_data_parser(parser.add_subparsers())
    args = parser.parse_args(["data", *words])
    return int(args.func(args))


# Corpus


def test_default_corpus_is_real_text_distinct_and_repeatable() -> None:
    first, second = default_corpus(1_500_000), default_corpus(1_500_000)
    assert first == second
    assert 1_000_000 <= first.nbytes <= 1_500_000
    assert len(set(first.documents)) == len(first.documents)
    assert any("import" in document for document in first.documents)


def test_too_little_text_names_the_way_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "one.py").write_text("print('hello')\n")
    monkeypatch.setattr(corpora.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(corpora, "_documentation", lambda: iter(()))
    with pytest.raises(DataError, match=r"only 15 bytes .* --input PATH\.\.\. --out PREFIX.* --data PREFIX"):
        default_corpus()


def test_inputs_are_read_once_each_without_hidden_and_binary_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("alpha\n")
    (tmp_path / "same.txt").write_text("alpha\n")
    (tmp_path / "b.md").write_text("beta\n")
    (tmp_path / ".hidden").write_text("no\n")
    (tmp_path / "picture").write_bytes(b"\x00\x01")
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    (tmp_path / "empty.txt").write_text("\n")
    corpus = read_inputs([tmp_path, tmp_path / "b.md"])
    assert list(corpus.documents) == ["alpha\n", "beta\n"]
    assert corpus.skipped == 2


def test_bad_inputs_are_named(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match="--input .*nowhere: there is no such file"):
        read_inputs([tmp_path / "nowhere"])
    with pytest.raises(DataError, match="latin: this file is not UTF-8"):
        read_inputs([tmp_path / "latin"])
    with pytest.raises(DataError, match="no text was found"):
        read_inputs([tmp_path])
    with pytest.raises(DataError, match="none given"):
        read_inputs([])


def test_long_documents_are_cut_at_line_ends_and_lose_nothing() -> None:
    text = some_text(1, 5000)
    parts = split_document(text, 1000)
    assert "".join(parts) == text
    assert all(len(part) <= 1000 for part in parts)
    assert all(part.endswith("\n") for part in parts[:-1])
    assert "".join(split_document("x" * 2500, 1000)) == "x" * 2500
    assert split_document("short") == ["short"]


# Tokenizer


def test_any_text_comes_back_unchanged(built: Path) -> None:
    tokenizer = load_tokenizer(built)
    for text in ("", "  indented\n\ttabs\n", "naïve — 中文 🙂", "a <eod> or <pad> in text", some_text(7, 50)):
        ids = tokenizer.tokenize(text)
        assert tokenizer.detokenize(ids) == text
        assert not {tokenizer.eod, tokenizer.pad} & set(ids)
    assert tokenizer.tokenize_batch(["a b", "c"]) == [tokenizer.tokenize("a b"), tokenizer.tokenize("c")]


def test_same_text_gives_the_same_tokenizer(texts: Path) -> None:
    documents = read_inputs([texts]).documents
    first, second = (train_tokenizer(documents, VOCAB) for _ in range(2))
    assert first.unique_identifiers == second.unique_identifiers


def test_vocabulary_is_exactly_as_large_as_asked(built: Path) -> None:
    tokenizer = load_tokenizer(built)
    assert tokenizer.vocab_size == VOCAB
    assert {tokenizer.eod, tokenizer.pad} == {0, 1}
    with pytest.raises(DataError, match=r"--vocab-size 5000: this text gives only \d+ entries; .*--vocab-size \d+"):
        train_tokenizer(["just one line of text"], 5000)
    with pytest.raises(DataError, match="--vocab-size 100: must be at least 258"):
        train_tokenizer(["text"], 100)


def test_broken_tokenizer_files_are_named(tmp_path: Path) -> None:
    file = tmp_path / "t.json"
    with pytest.raises(DataError, match="t.json: missing"):
        Tokenizer.load(file)
    for text in ("{ cut", "{}", '{"model": 3}'):
        file.write_text(text)
        with pytest.raises(DataError, match="t.json: not a tokenizer"):
            Tokenizer.load(file)


# Building and checking


def test_description_agrees_with_an_independent_count(built: Path, texts: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    described, tokenizer = info(built), load_tokenizer(built)
    dataset = IndexedDataset(str(built))
    counts = Counter(int(token) for i in range(len(dataset)) for token in dataset[i])
    total = sum(counts.values())
    assert (described.documents, described.tokens, described.vocab_size) == (len(dataset), total, VOCAB)
    entropy = -sum(n / total * math.log(n / total) for n in counts.values())
    assert described.unigram_entropy == pytest.approx(entropy, rel=1e-12)
    assert tokenizer.pad not in counts
    assert counts[tokenizer.eod] == 40
    written = {tokenizer.detokenize(dataset[i]) for i in range(len(dataset))}
    assert written == {file.read_text() for file in texts.iterdir()}


def test_entropy_of_known_distributions() -> None:
    assert unigram_entropy(np.array([5, 5, 0, 5, 5])) == pytest.approx(math.log(4))
    assert unigram_entropy(np.array([0, 9])) == 0


def test_same_input_gives_the_same_bytes(built: Path, texts: Path, tmp_path: Path) -> None:
    assert build([texts], tmp_path / "again", VOCAB).sha256 == info(built).sha256


def test_only_finished_files_are_left_and_a_rebuild_replaces_them(texts: Path, tmp_path: Path) -> None:
    stale = tmp_path / ".out.build-killed"
    stale.mkdir()
    first = build([texts], tmp_path / "out", VOCAB)
    assert not stale.exists()
    second = build([texts / "00.txt"], tmp_path / "out", 300)
    assert info(tmp_path / "out") == second != first
    assert sorted(os.listdir(tmp_path)) == [".out.lock", *sorted(f"out{suffix}" for suffix in building.SUFFIXES)]


def broken_data_sets() -> Iterator[tuple[str, Callable[[Path], object], str]]:
    def edit(suffix: str, change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
        def apply(prefix: Path) -> None:
            file = Path(f"{prefix}{suffix}")
            file.write_bytes(change(file.read_bytes()))

        return apply

    for suffix in (".bin", ".idx", ".tokenizer.json"):
        yield f"missing{suffix}", lambda p, s=suffix: os.unlink(f"{p}{s}"), rf"copy\{suffix}: missing; rebuild"
        yield f"cut{suffix}", edit(suffix, lambda raw: raw[:-7]), rf"copy\{suffix}: .* instead of .*cut or changed"
        flipped = edit(suffix, lambda raw: raw[:60] + bytes([raw[60] ^ 1]) + raw[61:])
        yield f"flipped{suffix}", flipped, rf"copy\{suffix}: the contents changed \(sha256 differs\); rebuild"
    yield "no-meta", lambda p: os.unlink(f"{p}.meta.json"), r"copy\.meta\.json: missing, so .* never finished"
    yield "bad-meta", edit(".meta.json", lambda raw: raw[:50]), r"copy\.meta\.json: not a data set's description"
    yield "other-meta", edit(".meta.json", lambda raw: b'{"format": 1}'), r"copy\.meta\.json: not a data set's"
    newer = edit(".meta.json", lambda raw: raw.replace(b'"format": 1', b'"format": 9'))
    yield "newer-meta", newer, r"copy\.meta\.json: format 9, this version reads 1"


@pytest.mark.parametrize(("harm", "message"), [pytest.param(h, m, id=i) for i, h, m in broken_data_sets()])
def test_broken_data_set_names_file_fault_and_command(copy: Path, harm: Callable[[Path], object], message: str) -> None:
    info(copy)
    harm(copy)
    with pytest.raises(DataError, match=message) as caught:
        info(copy)
    assert "fluid-npu data build --input" in str(caught.value)


def test_rebuild_command_names_the_inputs(copy: Path, texts: Path) -> None:
    os.truncate(f"{copy}.bin", 10)
    with pytest.raises(DataError, match=f"fluid-npu data build --input {texts} --out {copy}"):
        info(copy)


def test_absent_data_set(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no data set of that prefix"):
        info(tmp_path / "none")


def failing(number: int) -> Callable[..., Any]:
    def fail(*args: object, **kwargs: object) -> Any:
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize("where", ["add_document", "finalize"])
def test_full_disk_is_said_and_nothing_is_left(
    where: str, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    monkeypatch.setattr(IndexedDatasetBuilder, where, failing(errno.ENOSPC))
    with pytest.raises(DataError, match=r"--out .*out: .*the disk is full.*nothing was left.*free some space"):
        build([texts], tmp_path / "out", VOCAB)
    assert os.listdir(tmp_path) == [".out.lock"]


def test_a_write_that_really_fails_keeps_the_former_data_set(copy: Path, texts: Path) -> None:
    """The kernel refuses files beyond 4 kB: the former data set stays whole and the temporary files go."""
    before = info(copy)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(DataError, match="cannot write the data set"):
            build([texts], copy, VOCAB)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert info(copy) == before
    assert not list(copy.parent.glob(".copy.build-*"))


def test_output_that_cannot_be_written(texts: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot write the data set"):
        build([texts], tmp_path / "file" / "out", VOCAB)
    with pytest.raises(DataError, match="--out /: must end in a file name prefix"):
        build([texts], "/", VOCAB)


def ensure_once(cache: str) -> tuple[int, str, int]:
    """In a process of its own: how often this one built, and what it then found."""
    calls = 0
    corpus = read_inputs([Path(cache).parent / "texts"])

    def small_corpus() -> corpora.Corpus:
        nonlocal calls
        calls += 1
        return corpus

    building.default_corpus = small_corpus
    building.DEFAULT_VOCAB = VOCAB
    prefix = ensure_default(cache)
    return calls, prefix, info(prefix).tokens


def test_default_is_built_by_one_process_only(texts: Path, tmp_path: Path, run_ranks: Callable[..., list[Any]]) -> None:
    shutil.copytree(texts, tmp_path / "texts")
    answers = run_ranks(2, ensure_once, str(tmp_path / "cache"))
    assert sorted(calls for calls, _, _ in answers) == [0, 1]
    assert len({(prefix, tokens) for _, prefix, tokens in answers}) == 1


def test_default_is_rebuilt_when_it_is_broken(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = read_inputs([texts])
    built = []
    monkeypatch.setattr(building, "default_corpus", lambda: built.append(1) or corpus)
    monkeypatch.setattr(building, "DEFAULT_VOCAB", VOCAB)
    prefix = ensure_default(tmp_path)
    ensure_default(tmp_path)
    assert len(built) == 1
    os.truncate(f"{prefix}.bin", 100)
    info(ensure_default(tmp_path))
    assert len(built) == 2


# Batches


@pytest.fixture(scope="module")
def train(built: Path) -> Any:
    return build_datasets(built, seq_length=SEQ, samples=(10, 2, 0), seed=5).train


def test_splits_are_megatron_datasets_over_distinct_documents(built: Path) -> None:
    from megatron.core.datasets.gpt_dataset import GPTDataset

    splits = build_datasets(built, seq_length=SEQ, samples=(10, 2, 0), seed=5)
    assert isinstance(splits.train, GPTDataset)
    assert splits.test is None
    assert not set(splits.train.indices) & set(splits.valid.indices)
    assert len(splits.train.indices) + len(splits.valid.indices) == 40


def test_batch_has_the_shapes_and_shifted_labels(train: Any) -> None:
    batch = BatchIterator(train, micro_batch=3).batch(0)
    assert {name: tuple(tensor.shape) for name, tensor in batch.items()} == {
        "tokens": (3, SEQ),
        "labels": (3, SEQ),
        "loss_mask": (3, SEQ),
        "position_ids": (3, SEQ),
    }
    assert torch.equal(batch["tokens"][:, 1:], batch["labels"][:, :-1])
    assert torch.equal(batch["position_ids"], torch.arange(SEQ).expand(3, SEQ))
    assert (batch["loss_mask"] == 1).all()
    assert batch["tokens"].dtype == batch["labels"].dtype == torch.int64
    assert batch["tokens"].max() < VOCAB


def test_ranks_and_micro_batches_share_the_samples_without_overlap(train: Any) -> None:
    ranks = [
        BatchIterator(train, micro_batch=2, data_parallel_rank=r, data_parallel_size=3, num_micro_batches=2)
        for r in range(3)
    ]
    drawn = [n for step in range(4) for micro in range(2) for it in ranks for n in it.sample_numbers(step, micro)]
    assert drawn == list(range(4 * 2 * 3 * 2))


def test_one_rank_of_two_micro_batches_sees_what_two_ranks_of_one_see(train: Any) -> None:
    alone = BatchIterator(train, micro_batch=2, num_micro_batches=2)
    pair = [BatchIterator(train, micro_batch=2, data_parallel_rank=r, data_parallel_size=2) for r in range(2)]
    for step in range(3):
        for micro in range(2):
            assert torch.equal(alone.batch(step, micro)["tokens"], pair[micro].batch(step)["tokens"])


def test_resuming_gives_the_same_batches_over_several_passes(built: Path, train: Any) -> None:
    per_pass = len(train)
    steps = per_pass // 8 * 2 + 5  # beyond the second reshuffle
    unbroken = BatchIterator(train, micro_batch=4, num_micro_batches=2, seed=5)
    seen = [next(unbroken)["tokens"] for _ in range(2 * steps)]
    assert unbroken.step == steps
    again = build_datasets(built, seq_length=SEQ, samples=(999, 2, 0), seed=5).train
    half = steps // 2
    resumed = BatchIterator(again, micro_batch=4, num_micro_batches=2, seed=5, start_step=half)
    assert all(torch.equal(next(resumed)["tokens"], tokens) for tokens in seen[2 * half :])


def test_each_pass_holds_every_sample_once_in_its_own_order(train: Any) -> None:
    batches = BatchIterator(train, micro_batch=1, seed=5)
    passes = [[batches._sample(p * len(train) + i) for i in range(len(train))] for p in range(3)]
    assert all(sorted(order) == list(range(len(train))) for order in passes)
    assert passes[1] != passes[2] != passes[0]
    other = BatchIterator(train, micro_batch=1, seed=6)
    assert [other._sample(len(train) + i) for i in range(len(train))] != passes[1]


def test_seed_changes_the_order(built: Path, train: Any) -> None:
    other = build_datasets(built, seq_length=SEQ, samples=(10, 2, 0), seed=6).train
    assert not torch.equal(
        BatchIterator(train, micro_batch=8).batch(0)["tokens"], BatchIterator(other, micro_batch=8).batch(0)["tokens"]
    )


def test_impossible_sizes_are_refused(train: Any) -> None:
    with pytest.raises(ValueError, match="micro_batch 0"):
        BatchIterator(train, micro_batch=0)
    with pytest.raises(ValueError, match="data_parallel_rank 2"):
        BatchIterator(train, micro_batch=1, data_parallel_rank=2, data_parallel_size=2)


def test_too_little_text_for_a_sample_is_said(built: Path, tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"its training part has 38 documents with \d+ tokens, one sample needs 1000001"
    ):
        build_datasets(built, seq_length=1_000_000)
    with pytest.raises(ValueError, match="samples .*at least one"):
        build_datasets(built, seq_length=SEQ, samples=(0, 0, 0))


def test_corrupt_data_is_refused_before_training(copy: Path) -> None:
    raw = bytearray(Path(f"{copy}.bin").read_bytes())
    raw[100] ^= 1
    Path(f"{copy}.bin").write_bytes(raw)
    with pytest.raises(DataError, match="sha256 differs"):
        build_datasets(copy, seq_length=SEQ)


def test_index_files_cut_by_a_killed_run_are_rebuilt(copy: Path) -> None:
    first = build_datasets(copy, seq_length=SEQ, seed=5).train
    expected = BatchIterator(first, micro_batch=4).batch(3)["tokens"]
    files = list(Path(f"{copy}.cache").rglob("*.npy"))
    assert len(files) == 6
    for file in files:
        os.truncate(file, file.stat().st_size // 2)
    again = build_datasets(copy, seq_length=SEQ, seed=5).train
    assert torch.equal(BatchIterator(again, micro_batch=4).batch(3)["tokens"], expected)


def test_full_disk_while_writing_indices_is_said(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(np, "save", failing(errno.ENOSPC))
    with pytest.raises(DataError, match=r"sample indices cannot be written .*No space left.*free some space"):
        build_datasets(copy, seq_length=SEQ)
    monkeypatch.undo()
    assert len(build_datasets(copy, seq_length=SEQ).train) > 0


def test_indices_may_lie_elsewhere(copy: Path, tmp_path: Path) -> None:
    build_datasets(copy, seq_length=SEQ, cache=tmp_path / "indices")
    assert not Path(f"{copy}.cache").exists()
    assert len(list((tmp_path / "indices").rglob("*.npy"))) == 6


def test_a_rebuilt_data_set_does_not_meet_the_old_indices(texts: Path, tmp_path: Path) -> None:
    build([texts], tmp_path / "out", VOCAB)
    build_datasets(tmp_path / "out", seq_length=SEQ)
    build([texts / f"{i:02d}.txt" for i in range(25)], tmp_path / "out", VOCAB)
    splits = build_datasets(tmp_path / "out", seq_length=SEQ)
    batches = BatchIterator(splits.train, micro_batch=1)
    for step in range(len(splits.train)):
        assert batches.batch(step)["tokens"].max() < VOCAB
    assert len(list((tmp_path / "out.cache").iterdir())) == 2


def first_tokens(prefix: str) -> Any:
    """On every rank of a group: the first batch, or the error."""
    try:
        data = build_datasets(prefix, seq_length=SEQ, seed=5).train
    except DataError as error:
        return str(error)
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    return BatchIterator(data, micro_batch=2, data_parallel_rank=rank, data_parallel_size=size).batch(1)["tokens"]


def test_two_ranks_share_one_data_set(copy: Path, run_ranks: Callable[..., list[Any]]) -> None:
    ranks = run_ranks(2, first_tokens, str(copy))
    alone = BatchIterator(build_datasets(copy, seq_length=SEQ, seed=5).train, micro_batch=4).batch(1)["tokens"]
    assert torch.equal(torch.cat(ranks), alone)


def test_a_fault_on_rank_0_reaches_every_rank(copy: Path, run_ranks: Callable[..., list[Any]]) -> None:
    os.truncate(f"{copy}.idx", 100)
    texts = run_ranks(2, first_tokens, str(copy))
    assert texts[0] == texts[1]
    assert "copy.idx: 100 bytes instead of" in texts[0]


# Command line


def test_command_builds_and_describes(texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    assert data_command("build", "--input", str(texts), "--out", out, "--vocab-size", str(VOCAB)) == 0
    shown = capsys.readouterr().out
    assert "40 documents" in shown
    assert "unigram entropy" in shown
    assert data_command("info", out, "--json") == 0
    described = json.loads(capsys.readouterr().out)
    assert described == {"prefix": out, **info(out).as_dict()}


def test_command_exit_codes(texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert data_command("info", str(tmp_path / "none")) == 3
    assert "there is no data set" in capsys.readouterr().err
    assert data_command("build", "--input", str(tmp_path / "none"), "--out", str(tmp_path / "out")) == 3
    assert data_command("build", "--input", str(texts), "--out", str(tmp_path / "out"), "--vocab-size", "9") == 2
    assert "--vocab-size 9: must be at least 258" in capsys.readouterr().err
    assert data_command() == 2
    with pytest.raises(SystemExit) as caught:
        data_command("build", "--input", str(texts))
    assert caught.value.code == 2
