"""Self-attention of a context-parallel group in chunks of heads, each exchange beside the computation of others.

    qkv of chunk 0 -> sp2hp of chunk 0 || qkv of chunk 1 -> sp2hp of chunk 1 || ...
    attention of chunk 0 || sp2hp of the others -> hp2sp of chunk 0 || attention of chunk 1 -> ...
    output projection of all chunks, once

The backward is the same, read from right to left, since autograd runs later nodes first; and the projection's dX comes
chunk by chunk, each beside the exchanges before it. T rows of this rank, B batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.transformer.identity_op import IdentityOp
from torch import Tensor

from fluid_npu.comm.all_to_all import AllToAllHandle
from fluid_npu.comm.ulysses import start_hp2sp, start_sp2hp
from fluid_npu.mcore.context import ContextParallelCore, check_mask, packed_bounds
from fluid_npu.mcore.head_chunks import HeadChunk, HeadChunks
from fluid_npu.mcore.linear import InParts, InRows
from fluid_npu.mcore.lines.rotary import apply_rotary

#: Options of the configuration under which Megatron's forward does more than this one.
_OPTIONS = (
    "attention_output_gate",
    "fused_single_qkv_rope",
    "fine_grained_activation_offloading",
    "cpu_offloading",
    "test_mode",
)


def why_whole(attention: Any, hidden_states: Tensor, args: tuple[Any, ...], given: dict[str, Any]) -> str:
    """Why a call of ``attention`` must take Megatron's forward; empty: it can be cut. The same on every rank."""
    known = ("rotary_pos_emb", "packed_seq_params")
    named = [name for name, value in given.items() if value is not None and name not in known]
    if args or named:
        return f"the call has {', '.join(named) or 'positional arguments'}"
    packed = given.get("packed_seq_params")
    if packed is not None and packed.qkv_format != "thd":
        return f"packed sequences are in the format {packed.qkv_format}, not thd"
    for option in _OPTIONS:
        if getattr(attention.config, option, False):
            return f"{option} is set"
    if torch.is_autocast_enabled(hidden_states.device.type):
        return "autocast chooses the dtypes"
    return ""


def in_chunks(
    attention: Any,
    chunks: HeadChunks,
    hidden_states: Tensor,
    attention_mask: Tensor | None,
    rotary: Any,
    packed: Any = None,
) -> tuple[Tensor, Tensor | None]:
    """What Megatron's SelfAttention.forward returns: ``([T, B, H], bias or None)``.

    Args:
        attention: a SelfAttention with our core and linears.
        chunks: of its heads.
        hidden_states: ``[T, B, H]``; a tensor rank's part of the rows under sequence parallelism.
        attention_mask: of the whole sequence, or None.
        rotary: angles, or those of queries and of keys, or None.
        packed: Megatron's PackedSeqParams of sequences behind one another (then B is 1), or None.
    """
    size, shared = attention.hidden_size_per_attention_head, _shared(attention)
    flights = _Flights(attention.core_attention, chunks, attention_mask, attention.attn_mask_type, packed)

    def send(number: int, mixed: Tensor) -> None:
        mixed = mixed if packed is None else mixed.squeeze(1)
        flights.send(number, _heads(attention, mixed, chunks, number, rotary, packed_bounds(packed)))

    blocks = [chunk.blocks(shared) for chunk in chunks.chunks]
    attention.linear_qkv(InParts(parts=blocks, size=size, x=hidden_states, consume=send))
    for number in range(len(blocks)):
        flights.attend(number)
    out, bias = attention.linear_proj(InRows(parts=len(blocks), produce=flights.collect))
    return out, bias


class _Flights:
    """The exchanges of one call, from chunk to chunk."""

    def __init__(
        self, core: ContextParallelCore, chunks: HeadChunks, mask: Tensor | None, mask_type: Any, packed: Any
    ) -> None:
        assert core.context is not None
        self._core, self._context, self._chunks = core, core.context, chunks
        self._mask, self._mask_type, self._packed = mask, mask_type, packed
        self._there: list[AllToAllHandle] = []
        self._back: list[AllToAllHandle] = []
        self._keys: Sequence[Tensor] = ()

    def send(self, number: int, tensors: Sequence[Tensor]) -> None:
        """Starts the sp2hp of q, and of k and v where the chunk has some: ``[T, B, heads, D]``; packed without B."""
        context, first = self._context, tensors[0]
        self._shards, self._bounds = context.shards(first.shape[0], packed_bounds(self._packed), first.device)
        check_mask(self._mask, self._shards.total, self._packed)
        self._there.append(start_sp2hp(context.peers, tensors, self._shards, **self._how(number)))

    def attend(self, number: int) -> None:
        """Attention of a chunk's heads over the whole sequence; starts its hp2sp."""
        self._fill_again("sp2hp", number, 2 * len(self._chunks.chunks) - 1 - number)
        got = self._there[number].wait()
        query, *keys = (got,) if isinstance(got, Tensor) else got
        self._keys = keys or self._keys
        share, bounds = (self._chunks.heads, self._chunks.key_heads), self._bounds if self._packed is not None else None
        how = {"bounds": bounds, "share": share, "attn_mask_type": self._mask_type}
        out = self._core.attend_whole((query, *self._keys), self._mask, **how)
        how = {"by_rank": True, **self._how(number)}
        self._back.append(start_hp2sp(self._context.peers, out.unsqueeze(-2), self._shards, **how))

    def collect(self, number: int) -> Tensor:
        """``[T, B, P, n * D]``: of each rank its heads of a chunk."""
        self._fill_again("hp2sp", number, len(self._back) - 1 - number)
        out: Tensor = self._back[number].wait()
        return out if self._packed is None else out.unsqueeze(1)

    def _how(self, number: int) -> dict[str, Any]:
        return {"label": self._label(number), "sink": self._context.sink}

    def _label(self, number: int) -> str:
        return f"chunk {number + 1} of {len(self._chunks.chunks)}, {self._context.label}"

    def _fill_again(self, kind: str, number: int, ahead: int) -> None:
        self._context.fill_again(kind, self._label(number), ahead)


def _shared(attention: Any) -> int:
    """Query heads of one key head."""
    return int(attention.num_attention_heads_per_partition // attention.num_query_groups_per_partition)


def _heads(
    attention: Any, mixed: Tensor, chunks: HeadChunks, number: int, rotary: Any, bounds: Tensor | None
) -> list[Tensor]:
    """q, and k and v if the chunk has some, of its columns ``[T, B, blocks * D]``, packed without B: normed, turned."""
    chunk, shared, size = chunks.chunks[number], _shared(attention), attention.hidden_size_per_attention_head
    turns = rotary if isinstance(rotary, tuple) else (rotary, rotary)
    norms = [None if isinstance(norm, IdentityOp) else norm for norm in (attention.q_layernorm, attention.k_layernorm)]
    if chunk.whole_groups(shared) and norms == [None, None] and turns[0] is turns[1]:
        # Queries and keys alike: a call for both is half the launches.
        both, value = mixed.unflatten(-1, (-1, shared + 2, size)).split([shared + 1, 1], -2)
        both = _turned(attention, both.flatten(-3, -2), turns[0], bounds).unflatten(-2, (-1, shared + 1))
        query, key = both.split([shared, 1], -2)
        return [query.flatten(-3, -2), key.squeeze(-2), value.squeeze(-2)]
    query, *rest = _apart(mixed, chunk, shared, size)
    made = []
    for part, norm, turn in zip((query, *rest[:1]), norms, turns, strict=False):
        made.append(_turned(attention, part if norm is None else norm(part), turn, bounds))
    return [*made, *rest[1:]]


def _apart(mixed: Tensor, chunk: HeadChunk, shared: int, size: int) -> list[Tensor]:
    """The same without norm and turn."""
    if chunk.whole_groups(shared):
        query, key, value = mixed.unflatten(-1, (-1, shared + 2, size)).split([shared, 1, 1], -2)
        return [query.flatten(-3, -2), key.squeeze(-2), value.squeeze(-2)]
    query, keys = mixed.split([len(chunk.queries) * size, 2 * len(chunk.keys) * size], -1)
    query = query.unflatten(-1, (-1, size))
    return [query, *keys.unflatten(-1, (-1, 2, size)).unbind(-2)] if chunk.keys else [query]


def _turned(attention: Any, x: Tensor, angles: Tensor | None, bounds: Tensor | None) -> Tensor:
    return x if angles is None else apply_rotary(attention, x, angles, bounds)
