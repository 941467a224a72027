"""Text to train on: the Python standard library found on this machine, or the user's own files.

A corpus is a list of documents in a fixed order. Long files become several documents, cut at line ends, so that
one large file can still be split into training and validation parts. Standard library only.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fluid_npu.train.data.errors import DataError

DEFAULT_LIMIT = 8_000_000  # bytes of the default corpus: built in about 20 s on one core
LEAST_DEFAULT = 1_000_000
DOCS_SHARE = 0.25  # at most this part of the default corpus comes from documentation
DOCUMENT_CHARS = 32_768
_DOC_SUFFIXES = (".txt", ".md", ".rst")
_SKIPPED_DIRS = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Documents and where they are from; `nbytes` counts UTF-8 bytes, `skipped` files that are not text."""

    documents: Sequence[str]
    source: str
    inputs: Sequence[str] = field(default_factory=tuple)
    nbytes: int = 0
    skipped: int = 0


def default_corpus(limit: int = DEFAULT_LIMIT) -> Corpus:
    """The standard library's sources and documentation, at most `limit` bytes.

    The order is that of a hash of the relative path: every part of the library is in every part of the corpus,
    and the same Python gives the same order. Raises DataError when less than 1 MB is found.
    """
    docs = _take(_documentation(), int(limit * DOCS_SHARE))
    sources = _take(_library_sources(Path(sysconfig.get_path("stdlib"))), limit - _nbytes(docs))
    texts = sorted([*docs, *sources], key=lambda text: _digest(text.encode()))
    total = _nbytes(texts)
    if total < min(LEAST_DEFAULT, limit):
        raise DataError(
            f"only {total:,} bytes of text were found in this Python's standard library (at least "
            f"{LEAST_DEFAULT:,} are needed); build a data set from your own text with "
            "'fluid-npu data build --input PATH... --out PREFIX' and give it with --data PREFIX"
        )
    documents = [part for text in texts for part in split_document(text)]
    return Corpus(documents=documents, source="Python standard library: sources and documentation", nbytes=total)


def read_inputs(inputs: Sequence[str | os.PathLike[str]]) -> Corpus:
    """The text of the given files and of all text files below the given directories (hidden ones left out).

    Identical files count once. Raises DataError for a path that is missing, a named file that is not UTF-8 text,
    or when no text at all is found.
    """
    texts: dict[str, str] = {}
    skipped = 0
    for given in inputs:
        path = Path(given)
        if not path.exists():
            raise DataError(f"--input {given}: there is no such file or directory")
        for file in [path] if path.is_file() else _walk(path):
            text = _read_text(file)
            if text is None and file == path:
                raise DataError(f"--input {given}: this file is not UTF-8 text; convert it first (e.g. with iconv)")
            if text is None:
                skipped += 1
            elif text.strip():
                texts.setdefault(_digest(text.encode()), text)
    if not texts:
        names = " ".join(map(str, inputs)) or "(none given)"
        raise DataError(f"--input {names}: no text was found; give text files or directories that hold some")
    documents = [part for text in texts.values() for part in split_document(text)]
    return Corpus(
        documents=documents,
        source="files given with --input",
        inputs=tuple(str(given) for given in inputs),
        nbytes=_nbytes(texts.values()),
        skipped=skipped,
    )


def split_document(text: str, chars: int = DOCUMENT_CHARS) -> list[str]:
    """Pieces of about `chars` characters, cut after line ends; together they are the text again."""
    parts, start = [], 0
    while len(text) - start > chars:
        cut = text.rfind("\n", start, start + chars) + 1
        cut = cut if cut > start else start + chars
        parts.append(text[start:cut])
        start = cut
    return [*parts, text[start:]]


def _library_sources(stdlib: Path) -> Iterator[tuple[str, str]]:
    for file in _walk(stdlib):
        relative = file.relative_to(stdlib)
        # The topics are taken as text below; their file would repeat them inside quotes.
        if file.suffix == ".py" and relative.as_posix() != "pydoc_data/topics.py":
            yield relative.as_posix(), _read_text(file) or ""


def _documentation() -> Iterator[tuple[str, str]]:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        topics = {}
    for name, text in sorted(topics.items()):
        yield f"pydoc/{name}", text
    for root in ("/usr/share/doc",):
        for file in _walk(Path(root)):
            if file.suffix.lower() in _DOC_SUFFIXES:
                yield file.relative_to(root).as_posix(), _read_text(file) or ""


def _walk(root: Path) -> Iterator[Path]:
    """Regular files below `root` in a fixed order; no hidden ones, no tests, no packages, no links."""
    for folder, dirs, files in os.walk(root):
        dirs[:] = sorted(d for d in dirs if d not in _SKIPPED_DIRS and not d.startswith("."))
        for name in sorted(files):
            path = Path(folder, name)
            if not name.startswith(".") and path.is_file() and not path.is_symlink():
                yield path


def _take(named: Iterable[tuple[str, str]], limit: int) -> list[str]:
    """Distinct texts, in the order of the hash of their names, until `limit` bytes are reached."""
    seen: set[str] = set()
    taken: list[str] = []
    room = limit
    for _, text in sorted(named, key=lambda item: _digest(item[0].encode())):
        digest, size = _digest(text.encode()), len(text.encode())
        if digest in seen or not text.strip() or size > room:
            continue
        seen.add(digest)
        taken.append(text)
        room -= size
    return taken


def _read_text(path: Path) -> str | None:
    """The file's text, None if it is not UTF-8 text. Raises DataError when it cannot be read."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error
    if b"\0" in raw:
        return None
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return None


def _digest(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()


def _nbytes(texts: Iterable[str]) -> int:
    return sum(len(text.encode()) for text in texts)
