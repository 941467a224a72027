"""Process groups that some ranks make by themselves, under names that were never used.

torch names a group that is made without the ranks outside of it (``new_group(use_local_synchronization=True)``) by its
ranks and the number of groups that the process has at that moment. Two things go wrong with that. A group that comes
after another of the same ranks has ended gets the old name and so the old keys of the job's store, among them the
NCCL id of a communicator that is no more: a rank that reads it before the first rank has written the new one waits for
ever. And ranks with different numbers of groups, say because one of them has a group to itself, give one group several
names (pytorch issue 173608). Here the name is made of the ranks and of how many groups of theirs were made here before.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import Any
from unittest import mock

import torch.distributed as dist
from torch.distributed import distributed_c10d

_NAMER = "_hash_ranks_to_str"

#: Groups made so far by ranks: all of them make theirs in the same order.
_made: Counter[tuple[int, ...]] = Counter()


def new_local_group(ranks: Sequence[int], backend: str, options: Any = None) -> Any:
    """A process group of these ranks, this one among them; called by all of them, and by no other rank.

    Args:
        ranks: global ones.
        backend: such as 'nccl'.
        options: the backend's, None for its defaults.
    """
    key = tuple(ranks)
    number, _made[key] = _made[key], _made[key] + 1
    name = hashlib.sha1(f"fluid_npu {key} {number}".encode(), usedforsecurity=False).hexdigest()
    make: dict[str, Any] = {"backend": backend, "pg_options": options, "use_local_synchronization": True}
    if not hasattr(distributed_c10d, _NAMER):  # another torch: by its own names
        return dist.new_group(list(ranks), **make)
    with mock.patch.object(distributed_c10d, _NAMER, lambda ranks: name):
        return dist.new_group(list(ranks), **make)
