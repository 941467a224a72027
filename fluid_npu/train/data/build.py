"""Write and check a data set: PREFIX.bin and PREFIX.idx (Megatron IndexedDataset), tokenizer and description.

All files are written in a hidden directory beside PREFIX and renamed when complete; PREFIX.meta.json comes last,
so a data set without it was never finished. One lock file per PREFIX keeps two builders apart (a file lock: all
processes must see the same file system).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from fluid_npu.train.data.corpus import Corpus, default_corpus, read_inputs
from fluid_npu.train.data.errors import DataError
from fluid_npu.train.data.tokenizer import DEFAULT_VOCAB, Tokenizer, train_tokenizer

FORMAT = 1
SUFFIXES = (".bin", ".idx", ".tokenizer.json", ".meta.json")
DEFAULT_NAME = "stdlib-v1"
_META = ".meta.json"
_BATCH = 256  # documents encoded at once


@dataclass(frozen=True, kw_only=True)
class DataInfo:
    """What PREFIX.meta.json holds. `unigram_entropy` is in nats per token: the loss of a model that only knows
    how often each token occurs. Sizes are in bytes, `sha256` maps a suffix to the digest of that file."""

    format: int
    source: str
    inputs: list[str]
    documents: int
    text_bytes: int
    skipped_files: int
    tokens: int
    vocab_size: int
    unigram_entropy: float
    sizes: dict[str, int]
    sha256: dict[str, str]
    versions: dict[str, str]

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def build(
    inputs: Sequence[str | os.PathLike[str]],
    out_prefix: str | os.PathLike[str],
    vocab_size: int = DEFAULT_VOCAB,
) -> DataInfo:
    """Build a data set from files and directories; a finished one at `out_prefix` is replaced.

    Raises DataError for unreadable, empty or too small input and when the files cannot be written; nothing
    half-written is left then.
    """
    return _build_locked(read_inputs(inputs), Path(out_prefix), vocab_size)


def build_default(out_prefix: str | os.PathLike[str], vocab_size: int = DEFAULT_VOCAB) -> DataInfo:
    """As `build`, from the text of this Python's standard library."""
    return _build_locked(default_corpus(), Path(out_prefix), vocab_size)


def ensure_default(cache_dir: str | os.PathLike[str]) -> str:
    """The prefix of the default data set below `cache_dir`, built if it is not there or not whole.

    Several processes may call this at once: one builds, the others wait. Raises DataError as `build` does.
    """
    prefix = Path(cache_dir) / DEFAULT_NAME
    with contextlib.suppress(DataError):  # also when the directory may only be read
        info(prefix)
        return str(prefix)
    _make_parent(prefix)
    with _lock(prefix):
        try:
            info(prefix)
        except DataError:
            _write(default_corpus(), prefix, DEFAULT_VOCAB)
    return str(prefix)


def info(prefix: str | os.PathLike[str], *, checksum: bool = True) -> DataInfo:
    """Check a data set (files there, sizes, with `checksum` also their digests) and describe it.

    Raises DataError naming the file, what is wrong with it and the command that rebuilds it.
    """
    base = Path(prefix)
    present = [suffix for suffix in SUFFIXES if _file(base, suffix).is_file()]
    if not present:
        raise DataError(f"{base}: there is no data set of that prefix; {_rebuild(base, None)}")
    described = _read_meta(base)
    for suffix, size in described.sizes.items():
        file = _file(base, suffix)
        if not file.is_file():
            raise DataError(f"{file}: missing; {_rebuild(base, described)}")
        if file.stat().st_size != size:
            raise DataError(
                f"{file}: {file.stat().st_size:,} bytes instead of {size:,} (cut or changed); "
                f"{_rebuild(base, described)}"
            )
    for suffix, digest in described.sha256.items() if checksum else ():
        if _sha256(_file(base, suffix)) != digest:
            raise DataError(
                f"{_file(base, suffix)}: the contents changed (sha256 differs); {_rebuild(base, described)}"
            )
    return described


def load_tokenizer(prefix: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer of a data set. Raises DataError when it is missing or broken."""
    return Tokenizer.load(_file(Path(prefix), ".tokenizer.json"))


def unigram_entropy(counts_V: np.ndarray) -> float:
    """Entropy in nats of a token distribution, from counts of shape [V]."""
    share = counts_V[counts_V > 0] / counts_V.sum()
    return float(-(share * np.log(share)).sum())


def _build_locked(corpus: Corpus, prefix: Path, vocab_size: int) -> DataInfo:
    _make_parent(prefix)
    with _lock(prefix):
        return _write(corpus, prefix, vocab_size)


def _write(corpus: Corpus, prefix: Path, vocab_size: int) -> DataInfo:
    """Train the tokenizer and write everything; the caller holds the lock of `prefix`."""
    for stale in prefix.parent.glob(f".{prefix.name}.build-*"):
        shutil.rmtree(stale, ignore_errors=True)  # of a builder that was killed
    tokenizer = train_tokenizer(corpus.documents, vocab_size)
    work: Path | None = None
    try:
        work = Path(tempfile.mkdtemp(prefix=f".{prefix.name}.build-", dir=prefix.parent))
        described = _write_files(corpus, tokenizer, work / prefix.name)
        _publish(work / prefix.name, prefix)
    except OSError as error:
        raise _cannot_write(prefix, error) from error
    finally:
        if work is not None:
            shutil.rmtree(work, ignore_errors=True)
    return described


def _write_files(corpus: Corpus, tokenizer: Tokenizer, base: Path) -> DataInfo:
    counts_V = _write_tokens(corpus, tokenizer, base)
    tokenizer.save(_file(base, ".tokenizer.json"))
    written = [suffix for suffix in SUFFIXES if suffix != _META]
    described = DataInfo(
        format=FORMAT,
        source=corpus.source,
        inputs=list(corpus.inputs),
        documents=len(corpus.documents),
        text_bytes=corpus.nbytes,
        skipped_files=corpus.skipped,
        tokens=int(counts_V.sum()),
        vocab_size=tokenizer.vocab_size,
        unigram_entropy=unigram_entropy(counts_V),
        sizes={suffix: _file(base, suffix).stat().st_size for suffix in written},
        sha256={suffix: _sha256(_file(base, suffix)) for suffix in written},
        versions=_versions(),
    )
    _file(base, _META).write_text(json.dumps(described.as_dict(), indent=2) + "\n", encoding="utf-8")
    return described


def _write_tokens(corpus: Corpus, tokenizer: Tokenizer, base: Path) -> np.ndarray:
    """Write .bin and .idx, each document ended by <eod>; returns how often each token occurs, [V]."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    counts_V = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    dtype = DType.optimal_dtype(tokenizer.vocab_size)
    builder = IndexedDatasetBuilder(str(_file(base, ".bin")), dtype=dtype)
    try:
        for start in range(0, len(corpus.documents), _BATCH):
            for ids in tokenizer.tokenize_batch(corpus.documents[start : start + _BATCH]):
                tokens = np.array([*ids, tokenizer.eod], dtype=dtype)
                counts_V += np.bincount(tokens, minlength=len(counts_V))
                builder.add_document(tokens, [len(tokens)])
        builder.finalize(str(_file(base, ".idx")))
    finally:
        # After a failed write, closing would try the same write again.
        with contextlib.suppress(OSError, ValueError):
            builder.data_file.close()
    return counts_V


def _publish(work: Path, prefix: Path) -> None:
    """Rename the finished files to their places; the description goes first and comes back last."""
    for suffix in SUFFIXES:
        with open(_file(work, suffix), "rb") as file:
            os.fsync(file.fileno())
    _file(prefix, _META).unlink(missing_ok=True)
    for suffix in SUFFIXES:
        os.replace(_file(work, suffix), _file(prefix, suffix))


def _read_meta(base: Path) -> DataInfo:
    file = _file(base, _META)
    if not file.is_file():
        raise DataError(f"{file}: missing, so this data set was never finished; {_rebuild(base, None)}")
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        if raw["format"] != FORMAT:
            raise DataError(f"{file}: format {raw['format']}, this version reads {FORMAT}; {_rebuild(base, None)}")
        return DataInfo(**raw)
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file}: not a data set's description ({error}); {_rebuild(base, None)}") from error


def _rebuild(base: Path, described: DataInfo | None) -> str:
    """The command that builds the data set of that prefix again."""
    if described is None or not described.inputs:
        sources = "" if described is not None or base.name == DEFAULT_NAME else "--input PATH... "
    else:
        sources = f"--input {' '.join(described.inputs)} "
    return f"rebuild it with: fluid-npu data build {sources}--out {base}"


def _cannot_write(prefix: Path, error: OSError) -> DataError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    what = "the disk is full" if full else (error.strerror or str(error))
    fix = "free some space" if full else "choose a directory that can be written"
    return DataError(f"--out {prefix}: cannot write the data set ({what}); nothing was left there; {fix} and retry")


def _make_parent(prefix: Path) -> None:
    if not prefix.name:
        raise DataError(f"--out {prefix}: must end in a file name prefix, such as data/mytext")
    try:
        prefix.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _cannot_write(prefix, error) from error


@contextlib.contextmanager
def _lock(prefix: Path) -> Iterator[None]:
    """Hold the lock of a data set's prefix; raises DataError where no lock file can be made."""
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(file_lock(prefix.parent / f".{prefix.name}.lock"))
        except OSError as error:
            raise _cannot_write(prefix, error) from error
        yield


@contextlib.contextmanager
def file_lock(path: str | os.PathLike[str]) -> Iterator[None]:
    """Hold an exclusive lock on a file, which stays behind empty; the kernel frees it when its holder dies."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _file(base: Path, suffix: str) -> Path:
    # Not Path.with_suffix: a prefix may hold dots.
    return base.parent / (base.name + suffix)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("fluid-npu", "megatron-core", "tokenizers", "numpy"):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
