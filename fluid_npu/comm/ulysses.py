"""Ulysses: from sequence-sharded heads to a head-sharded sequence (sp2hp) and back (hp2sp), by one AllToAll each.

    sp2hp   [T, B, N, D] on each of P ranks, all heads of its rows   ->  [S, B, n, D], all rows of its heads
    hp2sp   [S, B, n, D]                                             ->  [T, B, P * n, D]

T rows of this rank, S of all ranks, B whatever lies between rows and heads (may be absent), N heads, n heads of this
rank, D head size. The sender of sp2hp copies once, to order its heads by destination; what arrives is the sequence.
hp2sp sends as is and copies once on arrival. Where Megatron's load-balanced split is undone, the other end copies too.

Where P does not divide N, each head is sent ``lcm(N, P) / N`` times, so that consecutive query heads still share their
key head: with 2 key heads on 4 ranks, ranks 0 and 1 hold the first and ranks 2 and 3 the second. The gradient is the
sum over the copies, on the rank that sent them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import lcm
from typing import Any

import torch
from torch import Tensor

from fluid_npu.comm.all_to_all import AllToAllHandle, Peers, Route, start_exchange
from fluid_npu.comm.shards import SequenceShards
from fluid_npu.comm.sink import OverlapSink


def fluid_all_to_all_sp2hp(
    x: Tensor,
    group: Any,
    async_op: bool = False,
    *,
    lengths: Sequence[int] | None = None,
    cu_seqlens: Sequence[int] | Tensor | None = None,
    label: str = "",
    sink: OverlapSink | None = None,
) -> Tensor | AllToAllHandle:
    """Sends each rank its heads of all rows; differentiable in both forms.

    Args:
        x: ``[T, ..., N, D]``, all heads of this rank's rows.
        group: a torch.distributed process group, in the order of the sequence.
        async_op: True returns an ``AllToAllHandle``, False the tensor.
        lengths: T of each rank where they differ, the same list on every rank; None: they are equal.
        cu_seqlens: bounds of the packed sequences that Megatron has dealt in its load-balanced order, ``[0, S]`` for
            one; rows come out in the order of the sequences. Where each rank holds one stretch of rows, none is needed.
        label: where the exchange belongs ("layer 3"), for error messages.
        sink: the engine that fills the flight of the backward; None for none.

    Returns:
        ``[S, ..., n, D]`` or a handle for it, n = lcm(N, P) / P.

    Raises:
        ValueError: lengths that are not one a rank or not those of x, bounds that do not fit, both of them.
        CollectiveError: a peer died or did not arrive in time.
    """
    if x.dim() < 3:
        raise ValueError(f"x of shape {tuple(x.shape)}: rows, heads and head size are needed, [T, ..., N, D]")
    peers = Peers.of(group)
    shards = _shards(peers, lengths, cu_seqlens, x.device, rows=x.shape[0])
    handle = start_sp2hp(peers, [x], shards, label=label, sink=sink)
    return handle if async_op else handle.wait()


def fluid_all_to_all_hp2sp(
    x: Tensor,
    group: Any,
    async_op: bool = False,
    *,
    lengths: Sequence[int] | None = None,
    cu_seqlens: Sequence[int] | Tensor | None = None,
    label: str = "",
    sink: OverlapSink | None = None,
) -> Tensor | AllToAllHandle:
    """Sends each rank its rows of all heads: the way back of ``fluid_all_to_all_sp2hp``, whose arguments it takes.

    Args:
        x: ``[S, ..., n, D]``, all rows of this rank's heads.

    Returns:
        ``[T, ..., P * n, D]`` or a handle for it, heads in rank order.

    Raises as ``fluid_all_to_all_sp2hp``.
    """
    if x.dim() < 3:
        raise ValueError(f"x of shape {tuple(x.shape)}: rows, heads and head size are needed, [S, ..., n, D]")
    peers = Peers.of(group)
    shards = _shards(peers, lengths, cu_seqlens, x.device, total=x.shape[0])
    handle = start_hp2sp(peers, x, shards, label=label, sink=sink)
    return handle if async_op else handle.wait()


def start_sp2hp(
    peers: Peers, tensors: Sequence[Tensor], shards: SequenceShards, *, label: str = "", sink: OverlapSink | None = None
) -> AllToAllHandle:
    """One sp2hp for several ``[T, ..., N, D]`` tensors of one dtype, such as q, k and v; N and D may differ.

    The handle gives one tensor, or a tuple; ``shards`` are taken as right.
    """
    ranks = len(peers.ranks)
    splits = tuple(HeadSplit(*tensor.shape[-2:], ranks=ranks) for tensor in tensors)
    rows = shards.lengths[peers.index]
    route = Route(
        peers=peers, output_splits=list(shards.lengths), input_splits=[rows] * ranks, comm_type="sp2hp", label=label
    )
    return start_exchange(
        route, tensors, loading=_DealHeads(splits), unloading=_WholeSequence(splits, shards), sink=sink
    )


def start_hp2sp(
    peers: Peers,
    x: Tensor,
    shards: SequenceShards,
    *,
    label: str = "",
    sink: OverlapSink | None = None,
    by_rank: bool = False,
) -> AllToAllHandle:
    """hp2sp of ``[S, ..., n, D]``; ``shards`` are taken as right.

    With ``by_rank`` the handle gives ``[T, ..., P, n * D]``, a view of what arrived, for who copies it anyway.
    """
    ranks = len(peers.ranks)
    heads, size = x.shape[-2:]
    split = HeadSplit(heads * ranks, size, ranks=ranks)
    rows = shards.lengths[peers.index]
    route = Route(
        peers=peers, output_splits=[rows] * ranks, input_splits=list(shards.lengths), comm_type="hp2sp", label=label
    )
    unloading = _WholeHeads(split, by_rank)
    return start_exchange(route, [x], loading=_DealRows(split, shards), unloading=unloading, sink=sink)


@dataclass(frozen=True)
class HeadSplit:
    """How the heads of one tensor are dealt: each ``copies`` times, in order, the same number to each rank."""

    heads: int
    size: int
    ranks: int

    @property
    def copies(self) -> int:
        """Ranks' share of a head, where there are more ranks than it divides."""
        return lcm(self.heads, self.ranks) // self.heads

    @property
    def local(self) -> int:
        """Heads of one rank: n."""
        return self.heads * self.copies // self.ranks

    @property
    def width(self) -> int:
        """Columns of one rank's part of a row."""
        return self.local * self.size

    def deal(self, target: Tensor, x: Tensor) -> None:
        """Writes ``[T, ..., N, D]`` into ``[P, T, ..., n * D]``, which may be a slice of wider rows."""
        target = target.unflatten(-1, (self.local, self.size))
        if self.copies > 1 and self.local == 1:
            target.unflatten(0, (self.heads, self.copies)).copy_(x.movedim(-2, 0).unsqueeze(1).unsqueeze(-2))
            return
        if self.copies > 1:
            x = x.repeat_interleave(self.copies, -2)
        target.copy_(x.unflatten(-2, (self.ranks, self.local)).movedim(-3, 0))

    def collect(self, rows: Tensor) -> Tensor:
        """``[P, T, ..., n * D]`` as ``[T, ..., N, D]``, the sum over the copies of each head."""
        parts = rows.unflatten(-1, (self.local, self.size))
        if self.copies > 1 and self.local == 1:
            return parts.squeeze(-2).unflatten(0, (self.heads, self.copies)).sum(1).movedim(0, -2)
        x = parts.movedim(0, -3).flatten(-3, -2)
        return x if self.copies == 1 else x.unflatten(-2, (self.heads, self.copies)).sum(-2)


@dataclass(frozen=True)
class _DealHeads:
    """Loads sp2hp: ``[T, ..., N, D]`` tensors as ``[P * T, ..., W]`` rows by destination."""

    splits: tuple[HeadSplit, ...]

    def load(self, *tensors: Tensor) -> Tensor:
        widths = [split.width for split in self.splits]
        rows = tensors[0].new_empty(self.splits[0].ranks, *tensors[0].shape[:-2], sum(widths))
        for split, part, tensor in zip(self.splits, rows.split(widths, -1), tensors, strict=True):
            split.deal(part, tensor)
        return rows.flatten(0, 1)

    def unload_grad(self, rows: Tensor) -> tuple[Tensor | None, ...]:
        ranks = self.splits[0].ranks
        parts = rows.unflatten(0, (ranks, rows.shape[0] // ranks)).split([split.width for split in self.splits], -1)
        return tuple(split.collect(part) for split, part in zip(self.splits, parts, strict=True))


@dataclass(frozen=True)
class _WholeSequence:
    """Unloads sp2hp: ``[S, ..., W]`` rows as ``[S, ..., n, D]`` tensors, in the order of the sequence."""

    splits: tuple[HeadSplit, ...]
    shards: SequenceShards

    def unload(self, rows: Tensor) -> tuple[Tensor, ...]:
        parts = rows.split([split.width for split in self.splits], -1)
        return tuple(
            self.shards.in_order(part.unflatten(-1, (split.local, split.size)))
            for split, part in zip(self.splits, parts, strict=True)
        )

    def load_grad(self, *grads: Tensor) -> Tensor:
        if len(grads) == 1:
            return self.shards.by_rank(grads[0].flatten(-2))
        widths = [split.width for split in self.splits]
        rows = grads[0].new_empty(*grads[0].shape[:-2], sum(widths))
        for part, grad in zip(rows.split(widths, -1), grads, strict=True):
            self.shards.write_by_rank(part, grad.flatten(-2))
        return rows


@dataclass(frozen=True)
class _DealRows:
    """Loads hp2sp: ``[S, ..., n, D]`` as ``[S, ..., W]`` rows in rank order."""

    split: HeadSplit
    shards: SequenceShards

    def load(self, *tensors: Tensor) -> Tensor:
        return self.shards.by_rank(tensors[0].flatten(-2))

    def unload_grad(self, rows: Tensor) -> tuple[Tensor | None, ...]:
        return (self.shards.in_order(rows).unflatten(-1, (self.split.local, self.split.size)),)


@dataclass(frozen=True)
class _WholeHeads:
    """Unloads hp2sp: ``[P * T, ..., W]`` rows, source by source, as ``[T, ..., P * n, D]``, or ``[T, ..., P, W]``."""

    split: HeadSplit
    by_rank: bool = False

    def unload(self, rows: Tensor) -> tuple[Tensor, ...]:
        parts = rows.unflatten(0, (self.split.ranks, rows.shape[0] // self.split.ranks))
        return (parts.movedim(0, -2) if self.by_rank else self.split.collect(parts),)

    def load_grad(self, *grads: Tensor) -> Tensor:
        (grad,) = grads
        if self.by_rank:
            return grad.movedim(-2, 0).flatten(0, 1)
        rows = grad.new_empty(self.split.ranks, *grad.shape[:-2], self.split.width)
        self.split.deal(rows, grad)
        return rows.flatten(0, 1)


def _shards(
    peers: Peers,
    lengths: Sequence[int] | None,
    cu_seqlens: Sequence[int] | Tensor | None,
    device: torch.device,
    *,
    rows: int | None = None,
    total: int | None = None,
) -> SequenceShards:
    """The split of a sequence of which this rank's rows, or all, are known."""
    ranks = len(peers.ranks)
    if lengths is not None and cu_seqlens is not None:
        raise ValueError(
            f"lengths={list(lengths)} beside cu_seqlens: Megatron's balanced split has equal lengths; leave lengths out"
        )
    if cu_seqlens is not None:
        shards = SequenceShards.balanced(cu_seqlens, ranks, device)
    elif lengths is not None:
        shards = SequenceShards.stretches(lengths)
    else:
        shards = SequenceShards.stretches(_equal(ranks, rows, total))
    name = "lengths" if lengths is not None else "cu_seqlens"
    _check(name, shards, peers, rows, total)
    return shards


def _equal(ranks: int, rows: int | None, total: int | None) -> list[int]:
    if rows is not None:
        return [rows] * ranks
    assert total is not None
    if total % ranks:
        raise ValueError(f"lengths=None: {total} rows do not divide by {ranks} ranks; give the rows of each rank")
    return [total // ranks] * ranks


def _check(name: str, shards: SequenceShards, peers: Peers, rows: int | None, total: int | None) -> None:
    lengths, ranks = list(shards.lengths), len(peers.ranks)
    if len(lengths) != ranks or min(lengths) < 0:
        raise ValueError(f"{name}={lengths}: one number of rows, 0 or more, for each of the {ranks} ranks is needed")
    if rows is not None and lengths[peers.index] != rows:
        raise ValueError(f"{name}: rank {peers.index} has {lengths[peers.index]} of {lengths}, but x has {rows} rows")
    if total is not None and shards.total != total:
        raise ValueError(f"{name}: {lengths} are {shards.total} rows, but x has {total}")
