"""Byte-level BPE with the `tokenizers` library, and the few attributes Megatron's datasets ask of a tokenizer.

Any text can be encoded and comes back unchanged: the 256 bytes are always in the vocabulary.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fluid_npu.train.data.errors import DataError

EOD, PAD = "<eod>", "<pad>"
DEFAULT_VOCAB = 4096
LEAST_VOCAB = 256 + 2  # the bytes and the two special tokens


class Tokenizer:
    """A trained byte-level BPE. `eod` ends a document; `pad` never occurs in data (Megatron masks it)."""

    def __init__(self, backend: Any) -> None:
        """Wrap a ``tokenizers.Tokenizer``. Raises DataError when it lacks the special tokens."""
        self._backend = backend
        backend.encode_special_tokens = True  # "<eod>" written in a text is text, not the end of a document
        ids = [backend.token_to_id(token) for token in (EOD, PAD)]
        if None in ids:
            raise DataError(f"this tokenizer has no {EOD} or {PAD} token; build it with 'fluid-npu data build'")
        self.eod: int = ids[0]
        self.pad: int = ids[1]
        text = backend.to_str()
        self._digest = hashlib.sha256(text.encode()).hexdigest()
        # Megatron writes this into its cache keys.
        self.unique_identifiers: OrderedDict[str, Any] = OrderedDict(
            [("class", type(self).__name__), ("sha256", self._digest), ("vocab_size", self.vocab_size)]
        )

    @property
    def vocab_size(self) -> int:
        """Number of entries, special tokens included."""
        return int(self._backend.get_vocab_size())

    @property
    def bos(self) -> int:
        """Documents begin after an end-of-document token."""
        return self.eod

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens."""
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids

    def tokenize_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of many texts, using all cores the library may use."""
        return [encoding.ids for encoding in self._backend.encode_batch(list(texts), add_special_tokens=False)]

    def detokenize(self, ids: Sequence[int]) -> str:
        """The text of token ids; special tokens give nothing."""
        text: str = self._backend.decode([int(i) for i in ids], skip_special_tokens=True)
        return text

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the tokenizer as JSON (the `tokenizers` format)."""
        Path(path).write_text(self._backend.to_str(pretty=False), encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Tokenizer:
        """Read what `save` wrote. Raises DataError when the file is missing or broken."""
        tokenizers = _library()
        try:
            text = Path(path).read_text(encoding="utf-8")
            json.loads(text)
            return cls(tokenizers.Tokenizer.from_str(text))
        except DataError:
            raise
        except FileNotFoundError as error:
            raise DataError(f"{path}: missing; rebuild it with 'fluid-npu data build'") from error
        # The library raises a bare Exception for JSON that is not a tokenizer.
        except Exception as error:
            raise DataError(f"{path}: not a tokenizer ({error}); rebuild it with 'fluid-npu data build'") from error


def train_tokenizer(texts: Iterable[str], vocab_size: int = DEFAULT_VOCAB) -> Tokenizer:
    """Train on `texts` until there are exactly `vocab_size` entries.

    Raises DataError when the size is below 258 or the text is too small to give that many.
    """
    if vocab_size < LEAST_VOCAB:
        raise DataError(f"--vocab-size {vocab_size}: must be at least {LEAST_VOCAB} (256 bytes and two special tokens)")
    tokenizers = _library()
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[EOD, PAD],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    tokenizer = Tokenizer(backend)
    if tokenizer.vocab_size != vocab_size:
        raise DataError(
            f"--vocab-size {vocab_size}: this text gives only {tokenizer.vocab_size} entries; "
            f"give more text with --input or use --vocab-size {tokenizer.vocab_size}"
        )
    return tokenizer


def _library() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise DataError(
            "the package 'tokenizers' is missing; install it with: pip install 'tokenizers>=0.20'"
        ) from error
    return tokenizers
