"""One forward pass through all pipeline stages outside of Megatron's schedules, which only know whole training steps.

S sequence length, T rows of this rank with context parallelism (else S), H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel

from fluid_npu.comm.shards import SequenceShards, balanced_part


def forward_logits(chunks: Sequence[GPTModel], tokens_1S: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Logits ``[1, S, V]`` in fp32, on every rank. All ranks call it, with the same tokens ``[1, S]``.

    Each chunk runs where it lives, in the order of the layers; its output is broadcast to the other stages.
    """
    group = parallel_state.get_pipeline_model_parallel_group()
    stages, here = group.size(), group.rank()
    whole, config = tokens_1S.shape[1], chunks[0].config
    tokens_1T, positions_1T = _mine(tokens_1S.to(device))
    length = tokens_1T.shape[1]
    # The layers are causal by type; with context parallelism they alone see whole sequences.
    masked = config.context_parallel_size == 1
    mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=device).triu_(1) if masked else None
    out = torch.empty(0)
    for number in range(stages * len(chunks)):
        chunk, last = chunks[number // stages], number == stages * len(chunks) - 1
        if number % stages == here:
            chunk.set_input_tensor([out if number else None])  # the first chunk reads the tokens
            out = chunk(tokens_1T, positions_1T, mask)
        elif last:
            out = torch.empty(1, length, chunk.vocab_size, dtype=config.params_dtype, device=device)
        else:
            out = torch.empty(length, 1, config.hidden_size, dtype=config.params_dtype, device=device)
        if stages > 1:
            out = out.contiguous()
            dist.broadcast(out, dist.get_global_rank(group, number % stages), group=group)
    return _all(out.float(), whole)


def _mine(tokens_1S: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's tokens ``[1, T]`` and their positions, of a sequence padded until it can be split."""
    ranks, rank = parallel_state.get_context_parallel_world_size(), parallel_state.get_context_parallel_rank()
    if ranks > 1:
        tokens_1S = torch.nn.functional.pad(tokens_1S, (0, -tokens_1S.shape[1] % (2 * ranks)))
    positions_1S = torch.arange(tokens_1S.shape[1], device=tokens_1S.device)[None]
    return balanced_part(tokens_1S, ranks, rank, 1), balanced_part(positions_1S, ranks, rank, 1)


def _all(logits_1TV: torch.Tensor, length: int) -> torch.Tensor:
    """``[1, S, V]`` of all context-parallel ranks, without the padding."""
    group = parallel_state.get_context_parallel_group()
    if group.size() == 1:
        return logits_1TV
    parts = [torch.empty_like(logits_1TV) for _ in range(group.size())]
    dist.all_gather(parts, logits_1TV.contiguous(), group=group)
    held = torch.cat(parts, 1)[0]
    shards = SequenceShards.balanced([0, held.shape[0]], group.size(), held.device)
    return shards.in_order(held)[None, :length]
