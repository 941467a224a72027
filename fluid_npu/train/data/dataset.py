"""Megatron GPTDatasets over a data set, and batches that are a function of (seed, step, rank).

Each split holds one pass over its documents, so the order of samples does not depend on how many steps a run has:
a resumed or prolonged run sees what an unbroken one sees. `BatchIterator` reshuffles for every further pass.

Symbols: B micro-batch, S sequence length.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fluid_npu.train.data.build import DataInfo, file_lock, info, load_tokenizer
from fluid_npu.train.data.errors import DataError

# Part of the documents for (training, validation, test), where a split is asked for.
SPLIT_WEIGHTS = (94, 5, 1)
# Beyond this size of PREFIX.bin its digest is left to `fluid-npu data info`: all ranks would wait for it.
CHECKSUM_LIMIT = 1 << 30


class Datasets(NamedTuple):
    """One Megatron GPTDataset per split; None where no samples were asked for."""

    train: Any
    valid: Any
    test: Any


def build_datasets(
    prefix: str | os.PathLike[str],
    *,
    seq_length: int,
    samples: tuple[int, int, int] = (1, 1, 0),
    seed: int = 1234,
    cache: str | os.PathLike[str] | None = None,
) -> Datasets:
    """The splits of a data set through Megatron's BlendedMegatronDatasetBuilder.

    `samples` only says which splits are wanted (0: not built); how many samples a run draws changes neither their
    order nor their number. In a process group every rank must call this: rank 0 writes the sample indices below
    `cache` (default PREFIX.cache), the others read them, so all ranks must see the same file system. A failure on
    rank 0 is raised as the same DataError on every rank.

    Raises DataError when the data set is missing, corrupt or too small or the indices cannot be written, and
    ValueError when no split is wanted.
    """
    if len(samples) != 3 or not any(samples):
        raise ValueError(f"samples {tuple(samples)}: three numbers, at least one of them above 0")
    plan = _Plan(prefix=str(prefix), seq_length=seq_length, samples=samples, seed=seed, cache=cache)
    failure = _on_rank_0(plan.prepare)
    if failure is not None:
        raise DataError(failure)
    try:
        return plan.load()
    except FileNotFoundError as error:
        raise DataError(
            f"--data {prefix}: rank {_rank()} does not see {error.filename}, which rank 0 wrote; "
            "put the data set on a file system that all machines share"
        ) from error


class BatchIterator:
    """Micro-batches of one data-parallel rank, step after step, without end.

    Sample `n` of the run goes to step n // G, G = micro_batch * data_parallel_size * num_micro_batches; within a
    step micro-batch m of rank r holds the samples (m * data_parallel_size + r) * micro_batch onwards. Each batch
    is a dict: tokens, labels and position_ids [B, S] int64, loss_mask [B, S] float32.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        micro_batch: int,
        data_parallel_rank: int = 0,
        data_parallel_size: int = 1,
        num_micro_batches: int = 1,
        start_step: int = 0,
        seed: int = 1234,
    ) -> None:
        """Raises DataError when the data set is empty, ValueError for sizes that make no sense."""
        if min(micro_batch, data_parallel_size, num_micro_batches) < 1 or start_step < 0:
            raise ValueError(
                f"micro_batch {micro_batch}, data_parallel_size {data_parallel_size} and num_micro_batches "
                f"{num_micro_batches} must be at least 1 and start_step {start_step} at least 0"
            )
        if not 0 <= data_parallel_rank < data_parallel_size:
            raise ValueError(f"data_parallel_rank {data_parallel_rank} is not below size {data_parallel_size}")
        if len(dataset) == 0:
            raise DataError("the data set holds not one whole sample; give more text or a smaller --seq-length")
        self.dataset = dataset
        self.micro_batch = micro_batch
        self.rank, self.size = data_parallel_rank, data_parallel_size
        self.num_micro_batches = num_micro_batches
        self.seed = seed
        self.step = start_step
        self._micro = 0
        self._order: tuple[int, np.ndarray | None] = (0, None)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return self

    def __next__(self) -> dict[str, Tensor]:
        """The next micro-batch; `step` moves on after the last one of a step."""
        batch = self.batch(self.step, self._micro)
        self._micro += 1
        if self._micro == self.num_micro_batches:
            self.step, self._micro = self.step + 1, 0
        return batch

    def batch(self, step: int, micro: int = 0) -> dict[str, Tensor]:
        """Micro-batch `micro` of step `step` (both from 0); does not move the iterator."""
        rows = [self.dataset[self._sample(n)] for n in self.sample_numbers(step, micro)]
        names = ("tokens", "labels", "loss_mask", "position_ids")
        return {name: torch.stack([row[name] for row in rows]) for name in names}

    def sample_numbers(self, step: int, micro: int = 0) -> range:
        """The numbers, counted over the whole run, of the samples in a micro-batch of this rank."""
        slot = (step * self.num_micro_batches + micro) * self.size + self.rank
        return range(slot * self.micro_batch, (slot + 1) * self.micro_batch)

    def _sample(self, number: int) -> int:
        """Place in the data set of the run's sample `number`."""
        epoch, place = divmod(number, len(self.dataset))
        if epoch == 0:
            return place  # Megatron has shuffled the first pass
        if self._order[0] != epoch:
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self.dataset))
            self._order = (epoch, order)
        order_ = self._order[1]
        assert order_ is not None
        return int(order_[place])


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """What to build; the same on every rank."""

    prefix: str
    seq_length: int
    samples: Sequence[int]
    seed: int
    cache: str | os.PathLike[str] | None

    def prepare(self) -> None:
        """Check the data and write the indices, on this rank alone."""
        described = info(self.prefix, checksum=False)
        if described.sizes[".bin"] <= CHECKSUM_LIMIT:
            info(self.prefix)
        builder, cache = self._builder(described)
        splits = builder.config.split_matrix
        _check_sizes(self.prefix, splits, self.seq_length)
        cache.mkdir(parents=True, exist_ok=True)
        with file_lock(cache / ".lock"):
            _drop_broken_indices(cache)
            try:
                # Without Megatron's barriers: only this rank is here, and its failure must reach the others.
                builder._build_megatron_dataset_splits(self.prefix, splits, [None] * 3, synchronize_ranks=False)
            except BaseException:
                _drop_broken_indices(cache)
                raise

    def load(self) -> Datasets:
        """Open the splits; the indices are there already."""
        builder, _ = self._builder(info(self.prefix, checksum=False))
        return Datasets(*builder.build())

    def _builder(self, described: DataInfo) -> tuple[Any, Path]:
        from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
        from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

        # Named after the contents: Megatron's own key holds only the path, and a rebuilt data set has the same.
        key = described.sha256[".bin"][:8] + described.sha256[".idx"][:8]
        cache = Path(self.cache if self.cache is not None else f"{self.prefix}.cache") / key
        weights = [weight if wanted else 0 for weight, wanted in zip(SPLIT_WEIGHTS, self.samples, strict=True)]
        config = GPTDatasetConfig(
            random_seed=self.seed,
            sequence_length=self.seq_length,
            blend=([self.prefix], None),
            split=",".join(map(str, weights)),
            path_to_cache=str(cache),
            tokenizer=load_tokenizer(self.prefix),
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
        )
        # No sizes: one pass over each split.
        return BlendedMegatronDatasetBuilder(GPTDataset, [None] * 3, lambda: True, config), cache


def _check_sizes(prefix: str | os.PathLike[str], splits: Sequence[tuple[float, float] | None], seq_length: int) -> None:
    """Raise DataError when a split would not hold one sample of seq_length + 1 tokens."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    indexed = IndexedDataset(str(prefix), mmap=False)  # must outlive its arrays: they point into its mapped file
    lengths_D = indexed.sequence_lengths
    for name, part in zip(("training", "validation", "test"), splits, strict=True):
        if part is None:
            continue
        # The same rounding as Megatron's.
        first, last = (int(round(edge * float(len(lengths_D)))) for edge in part)
        tokens = int(lengths_D[first:last].sum())
        if tokens < seq_length + 1:
            raise DataError(
                f"--data {prefix}: its {name} part has {last - first} documents with {tokens} tokens, one sample "
                f"needs {seq_length + 1}; build it from more text or use a smaller --seq-length"
            )


def _drop_broken_indices(cache: Path) -> None:
    """Remove index files that a killed run left half-written; Megatron would take them for whole."""
    for file in cache.glob("*.npy") if cache.is_dir() else ():
        try:
            np.load(file, mmap_mode="r")
        except (ValueError, EOFError, OSError):
            file.unlink(missing_ok=True)


def _rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def _on_rank_0(work: Any) -> str | None:
    """Run `work` on rank 0 while the others wait; None, or on every rank the text of what went wrong."""
    failure: list[str | None] = [None]
    if _rank() == 0:
        try:
            work()
        except (DataError, ValueError) as error:
            failure = [str(error)]
        except OSError as error:
            failure = [f"the sample indices cannot be written beside the data set ({error}); free some space"]
        except Exception as error:
            failure = [f"the data set cannot be opened ({type(error).__name__}: {error})"]
    if torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(failure, src=0)
    return failure[0]
