"""The tail of a payload row: a row's probability, bit for bit, in 16 bytes behind its H token columns.

It is repeated to fill them, so rows stay aligned for matrix kernels. N or R rows, H hidden, W payload width.
"""

from __future__ import annotations

import torch
from torch import Tensor

TAIL_BYTES = 16


def payload_width(hidden: int, dtype: torch.dtype) -> int:
    """W for tokens of ``hidden`` columns."""
    return hidden + TAIL_BYTES // dtype.itemsize


def write_tail(payload: Tensor, hidden: int, p: Tensor) -> None:
    """Puts ``p`` [N], in its own dtype, behind the tokens of the rows of ``payload``."""
    tail = payload[:, hidden:]
    if p.dtype == payload.dtype:
        tail.copy_(p.unsqueeze(-1))
        return
    words = p.unsqueeze(-1).view(payload.dtype)
    tail.unflatten(1, (-1, words.shape[1])).copy_(words.unsqueeze(1))


def read_tail(payload: Tensor, hidden: int, dtype: torch.dtype) -> Tensor:
    """[N] of ``dtype``, a copy."""
    if dtype == payload.dtype:
        return payload.select(1, hidden).contiguous()
    words = dtype.itemsize // payload.element_size()
    return payload[:, hidden : hidden + words].contiguous().view(dtype).view(-1)
