"""One forward pass through all pipeline stages outside of Megatron's schedules, which only know whole training steps.

S sequence length, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel


def forward_logits(chunks: Sequence[GPTModel], tokens_1S: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Logits ``[1, S, V]`` in fp32, on every rank. All ranks call it, with the same tokens ``[1, S]``.

    Each chunk runs where it lives, in the order of the layers; its output is broadcast to the other stages.
    """
    group = parallel_state.get_pipeline_model_parallel_group()
    stages, here = group.size(), group.rank()
    length, config = tokens_1S.shape[1], chunks[0].config
    mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=device).triu_(1)
    positions_1S = torch.arange(length, device=device)[None]
    out = torch.empty(0)
    for number in range(stages * len(chunks)):
        chunk, last = chunks[number // stages], number == stages * len(chunks) - 1
        if number % stages == here:
            chunk.set_input_tensor([out if number else None])  # the first chunk reads the tokens
            out = chunk(tokens_1S.to(device), positions_1S, mask)
        elif last:
            out = torch.empty(1, length, chunk.vocab_size, dtype=config.params_dtype, device=device)
        else:
            out = torch.empty(length, 1, config.hidden_size, dtype=config.params_dtype, device=device)
        if stages > 1:
            out = out.contiguous()
            dist.broadcast(out, dist.get_global_rank(group, number % stages), group=group)
    return out.float()
