"""Core attention of one layer over a context-parallel group.

    ulysses   q, k, v of this rank's rows, all heads -> sp2hp -> whole sequence, this rank's heads -> attention -> hp2sp
    ring      keys and values pass around the ranks beside attention to them (``ops.ring_attention``)

Ulysses is taken where P divides the query heads: it keeps the device's fused attention, masks, dropout and packed
sequences. ``cp_comm_type`` 'ring' and 'ulysses' ask for one; Megatron's own words are Transformer Engine's, of which
'a2a' is Ulysses.

Megatron deals a sequence to the ranks in its load-balanced order and turns queries and keys by their true positions
before it calls the core; Ulysses puts the rows in order again before anything is masked. S rows of the sequence, T of
this rank, B batch, N query heads, M key heads, D head size, V of values; P ranks.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from math import lcm
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from fluid_npu.comm.all_to_all import Peers
from fluid_npu.comm.ring import pass_on
from fluid_npu.comm.shards import SequenceShards
from fluid_npu.comm.sink import DirectSink, OverlapSink
from fluid_npu.comm.ulysses import start_hp2sp, start_sp2hp
from fluid_npu.device import device_of
from fluid_npu.device.choice import Choice
from fluid_npu.ops.ring_attention import RingCall, ring_attention, ring_block
from fluid_npu.schedule.scheduler import BackwardScheduler

_FIX = "use --context-parallel-size"
#: A recomputed layer's dispatch, its combine, and the combine's backward, which takes what is left.
_EXPERTS_GAPS = 3
#: What ``cp_comm_type`` may ask for, and what it means here.
_ASKED = {"ring": "ring", "ulysses": "ulysses", "a2a": "ulysses"}


class ContextParallel:
    """One layer's place in its context-parallel group."""

    def __init__(self, group: Any) -> None:
        self.peers = Peers.of(group)
        self.algorithm = "ulysses"
        self.sink: OverlapSink = DirectSink()
        self.label = ""
        self._last: tuple[Any, SequenceShards, list[int]] | None = None

    @property
    def ranks(self) -> int:
        """P."""
        return len(self.peers.ranks)

    def shards(self, rows: int, bounds: Tensor | None, device: torch.device) -> tuple[SequenceShards, list[int]]:
        """How T ``rows`` of each rank make the sequence, and where its packed sequences begin and end.

        The last answer is kept: reading ``bounds`` waits for the device.
        """
        if self._last is not None and (bounds is self._last[0] if bounds is not None else rows == self._last[0]):
            return self._last[1], self._last[2]
        whole = [0, rows * self.ranks] if bounds is None else bounds.tolist()
        shards = SequenceShards.balanced(whole, self.ranks, device)
        if shards.lengths[0] != rows:
            raise ValueError(f"cu_seqlens={whole}: {self.ranks} ranks hold {shards.lengths[0]} rows each, not {rows}")
        self._last = (rows if bounds is None else bounds, shards, whole)
        return shards, whole

    def fill_again(self, kind: str, label: str, ahead: int) -> None:
        """Beside an exchange of a forward that is repeated in a backward, when the layer is recomputed: a share of dW.

        ``ahead`` more exchanges of this attention follow, then those of the layer's experts.
        """
        if isinstance(self.sink, BackwardScheduler):
            self.sink.fill_again(f"{kind} AllToAll of {label}", gaps=1 + ahead + _EXPERTS_GAPS)


class ContextParallelCore:
    """Goes before a DotProductAttention in a class's bases: without context parallelism it is that class, unchanged.

    With Ulysses ``forward`` exchanges heads for rows, and the class computes whole sequences with its share of heads.
    Key heads that P does not divide are held by several ranks (``comm.ulysses``). ``recompute`` computes attention
    again in backward instead of keeping its scores; the exchanges are not repeated. The ring keeps no scores anyway.

    Raises:
        ValueError: Ulysses is asked for and P does not divide the query heads of a tensor-parallel rank, or an option
            is not implemented with context parallelism.
    """

    context: ContextParallel | None = None
    recompute = False

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        if config.context_parallel_size == 1:
            super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
            return
        alone = copy.copy(config)
        alone.context_parallel_size = 1  # Megatron's core asserts it, and is right: it gets whole sequences
        super().__init__(alone, *args, **kwargs)  # type: ignore[call-arg]
        self.config = config
        self.context = ContextParallel(_group(config, kwargs.get("pg_collection")))
        core, ranks = _fields(self), self.context.ranks
        if getattr(core, "softmax_offset", None) is not None:
            raise ValueError(
                f"softmax_type={core.config.softmax_type!r}: not implemented with context parallelism; {_FIX} 1"
            )
        chosen = choose_algorithm(kwargs.get("cp_comm_type"), core.num_attention_heads_per_partition, ranks)
        self.context.algorithm = chosen.announce("context parallelism").value
        if chosen.value == "ulysses":
            self._take_share(self.context)
        elif core.attention_dropout.p > 0:
            raise ValueError(
                f"attention_dropout={core.attention_dropout.p}: ring attention has none ({chosen.reason}); set "
                "--attention-dropout 0, or a --context-parallel-size that divides the heads"
            )

    def _take_share(self, context: ContextParallel) -> None:
        """Megatron's forward reads from these how many heads there are."""
        ranks, core = context.ranks, _fields(self)
        heads, key_heads = core.num_attention_heads_per_partition, core.num_query_groups_per_partition
        core.num_attention_heads_per_partition = heads // ranks
        core.num_query_groups_per_partition = lcm(key_heads, ranks) // ranks
        core.hidden_size_per_partition //= ranks
        core.attention_dropout = RankDropout(core.attention_dropout.p, context.peers.index)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """``[T, B, N * V]``. q ``[T, B, N, D]``, k ``[T, B, M, D]``, v ``[T, B, M, V]``; packed ones have no B.

        ``attention_mask``, True where a key is hidden, is of the whole sequence: ``[B or 1, 1, S, S]``.
        """
        attend: Callable[..., Tensor] = super().forward
        context = self.context
        if context is None:
            return attend(query, key, value, attention_mask, *args, **kwargs)
        packed = kwargs.pop("packed_seq_params", None)
        if context.algorithm == "ring":
            _check_ring(attention_mask, packed)
            return ring_attention(query, key, value, _with_block(query, key, value, self._ring(context)))
        shards, bounds = context.shards(query.shape[0], packed_bounds(packed), query.device)
        check_mask(attention_mask, shards.total, packed)
        how: dict[str, Any] = {"label": context.label, "sink": context.sink}
        there = start_sp2hp(context.peers, [query, key, value], shards, **how)
        context.fill_again("sp2hp", context.label, ahead=1)
        whole = there.wait()
        packing = None if packed is None else bounds
        out = self.attend_whole(whole, attention_mask, *args, bounds=packing, **kwargs)
        back = start_hp2sp(context.peers, out.unsqueeze(-2), shards, **how)
        context.fill_again("hp2sp", context.label, ahead=0)
        mine: Tensor = back.wait()
        return mine.flatten(-2)

    def attend_whole(
        self,
        qkv: tuple[Tensor, ...],
        mask: Tensor | None,
        *args: Any,
        bounds: list[int] | None = None,
        share: tuple[int, int] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """``[S, B, heads * V]`` of q, k, v over whole sequences, computed again in backward with ``recompute``.

        ``bounds`` are those of packed sequences; ``share`` the query and key heads given, if not all of this rank's.
        """
        attend: Callable[..., Tensor] = super().forward

        def on_whole(*qkv: Tensor) -> Tensor:
            with self._with_share(share):
                if bounds is None:
                    return attend(*qkv, mask, *args, **kwargs)
                return _one_by_one(attend, qkv, bounds, *args, **kwargs)

        again = self.recompute and self.training  # type: ignore[attr-defined]
        return tensor_parallel.checkpoint(on_whole, False, *qkv) if again else on_whole(*qkv)

    @contextmanager
    def _with_share(self, share: tuple[int, int] | None) -> Iterator[None]:
        """Megatron's forward reads the number of heads from fields; in the body they are those of ``share``."""
        if share is None:
            yield
            return
        core, names = vars(self), ("num_attention_heads_per_partition", "num_query_groups_per_partition")
        before = {name: core[name] for name in (*names, "hidden_size_per_partition")}
        hidden = before["hidden_size_per_partition"] // before[names[0]] * share[0]
        # Past Module.__setattr__, which looks for parameters and modules at every name.
        core.update(zip(names, share, strict=True), hidden_size_per_partition=hidden)
        try:
            yield
        finally:
            core.update(before)

    def _ring(self, context: ContextParallel) -> RingCall:
        """What Megatron's masked softmax computes without a mask, around the ranks."""
        core, sink, label = _fields(self), context.sink, context.label
        softmax = core.scale_mask_softmax
        causal = (None, 0) if softmax.attn_mask_type == AttnMaskType.causal else (None, None)
        left, right = getattr(softmax, "window_size", None) or causal
        return RingCall(
            # As in Megatron: with query-key layer scaling the softmax multiplies by what the scores were divided by.
            scale=core.softmax_scale * (1.0 if softmax.scale is None else softmax.scale),
            ranks=context.ranks,
            rank=context.peers.index,
            pass_on=lambda rows, back: pass_on(context.peers, rows, sink, label=label, backward=back).land,
            left=left,
            right=right,
            beside=lambda: sink.fill("ring", f"ring AllToAll of {label}"),
        )


class RankDropout(torch.nn.Dropout):
    """Dropout that differs between the ranks of a context-parallel group, which hold different heads.

    Megatron gives them one random state. Each call takes the state as it is, and the rank, as the seed of its own
    numbers; so recomputation, which restores the state, repeats them.
    """

    def __init__(self, p: float, rank: int) -> None:
        super().__init__(p)
        self._rank = rank

    def forward(self, input: Tensor) -> Tensor:
        """The shape of ``input``."""
        if not self.training or self.p == 0:
            return input
        with self.own_numbers(input):
            return super().forward(input)

    @contextmanager
    def own_numbers(self, like: Tensor) -> Iterator[None]:
        """In the body the device of ``like`` draws this rank's numbers."""
        device = device_of(like)
        state = device.get_rng_state()
        torch.rand(1, device=like.device)  # the next call finds another state
        outer, host = device.get_rng_state(), torch.get_rng_state()
        digest = hashlib.blake2b(state.numpy().tobytes(), digest_size=7, salt=self._rank.to_bytes(8, "little"))
        device.manual_seed(int.from_bytes(digest.digest(), "little"))
        try:
            yield
        finally:
            torch.set_rng_state(host)
            device.set_rng_state(outer)


def _group(config: TransformerConfig, groups: Any) -> Any:
    """The context-parallel group: of the model's own process groups, or Megatron's global one."""
    group = getattr(groups, "cp", None)
    if group is None:
        group = parallel_state.get_context_parallel_group()
    if group.size() != config.context_parallel_size:
        raise ValueError(
            f"context_parallel_size={config.context_parallel_size}: the context-parallel group has {group.size()} "
            f"ranks; call initialize_model_parallel(context_parallel_size={config.context_parallel_size}) first"
        )
    return group


def choose_algorithm(asked: str | None, heads: int, ranks: int) -> Choice[str]:
    """'ulysses' or 'ring' for the query ``heads`` of a tensor-parallel rank; ``asked`` is ``cp_comm_type``.

    Raises ValueError where Ulysses is asked for and cannot be.
    """
    fits = heads % ranks == 0
    if asked in _ASKED:
        if _ASKED[asked] == "ulysses" and not fits:
            fit = max(size for size in range(1, ranks) if heads % size == 0)
            raise ValueError(
                f"context_parallel_size={ranks}: with cp_comm_type={asked!r} it must divide the {heads} attention "
                f"heads of a tensor-parallel rank; {_FIX} {fit} or cp_comm_type='ring'"
            )
        return Choice(_ASKED[asked], f"cp_comm_type={asked!r}")
    note = "" if asked is None else f"; cp_comm_type={asked!r} is Transformer Engine's"
    if fits:
        return Choice("ulysses", f"each of {ranks} ranks takes {heads // ranks} of {heads} heads{note}")
    return Choice("ring", f"{ranks} ranks cannot share {heads} heads{note}")


def _with_block(query: Tensor, key: Tensor, value: Tensor, call: RingCall) -> RingCall:
    """With the device's fused operator for its blocks, where there is one; said once."""
    block, reason = ring_block(query, key, value, call)
    Choice("plain products" if block is None else "fused blocks", reason).announce("ring attention")
    return replace(call, block=block)


def _check_ring(mask: Tensor | None, packed: Any) -> None:
    for name, given in (("attention_mask", mask), ("packed_seq_params", packed)):
        if given is not None:
            raise ValueError(
                f"{name}: ring attention takes none, it masks by the layer's type and window; pass None, or set a "
                "--context-parallel-size that divides the heads"
            )


def packed_bounds(packed: Any) -> Tensor | None:
    """Where packed sequences begin and end, padding included."""
    if packed is None:
        return None
    padded = getattr(packed, "cu_seqlens_q_padded", None)
    bounds: Tensor = padded if padded is not None else packed.cu_seqlens_q
    return bounds


def check_mask(mask: Tensor | None, total: int, packed: Any) -> None:
    """Raises ValueError for a mask that is not of the ``total`` rows of the sequence."""
    if mask is None:
        return
    if packed is not None:
        raise ValueError("attention_mask beside packed sequences: they are causal by type; pass attention_mask=None")
    if tuple(mask.shape[-2:]) != (total, total):
        raise ValueError(
            f"attention_mask of shape {tuple(mask.shape)}: with context parallelism a mask of the whole sequence is "
            f"needed, [..., {total}, {total}]; pass None where the layers are causal by type "
            "(Megatron-LM: --no-create-attention-mask-in-dataloader)"
        )


def _one_by_one(
    attend: Callable[..., Tensor], qkv: tuple[Tensor, ...], bounds: list[int], *args: Any, **kwargs: Any
) -> Tensor:
    """Packed sequences ``[S, heads, size]``, each by itself -> ``[S, heads * V]``."""
    outs = [
        attend(*(x[start:end].unsqueeze(1) for x in qkv), None, *args, **kwargs).squeeze(1)
        for start, end in zip(bounds, bounds[1:], strict=False)
        if end > start
    ]
    return torch.cat(outs)


def _fields(core: Any) -> Any:
    """``core`` as what it is beside this class: a DotProductAttention."""
    return core
