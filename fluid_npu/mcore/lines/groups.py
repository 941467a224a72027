"""Process groups of the experts: handed over as a ``ProcessGroupCollection`` (from 0.14), global before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from megatron.core import parallel_state
from megatron.core.transformer.moe import moe_utils


class ProcessGroups(Protocol):
    """What is read of a collection: expert-parallel, expert-tensor, expert-data, and the first two together."""

    ep: Any
    expt_tp: Any
    expt_dp: Any
    tp_ep: Any


@dataclass(kw_only=True)
class _GlobalGroups:
    ep: Any
    expt_tp: Any
    expt_dp: Any
    tp_ep: Any
    pp: Any


def default_groups() -> ProcessGroups:
    """Megatron's global groups."""
    if hasattr(moe_utils, "get_default_pg_collection"):
        groups: ProcessGroups = moe_utils.get_default_pg_collection()
        return groups
    return _GlobalGroups(
        ep=parallel_state.get_expert_model_parallel_group(),
        expt_tp=parallel_state.get_expert_tensor_parallel_group(),
        expt_dp=parallel_state.get_expert_data_parallel_group(),
        tp_ep=parallel_state.get_expert_tensor_and_model_parallel_group(),
        pp=parallel_state.get_pipeline_model_parallel_group(),
    )


def expert_rank(experts: Any) -> int:
    """This rank's place in the expert-parallel group of an experts module, ours or Megatron's."""
    group = getattr(experts, "ep_group", None)
    rank: int = parallel_state.get_expert_model_parallel_rank() if group is None else group.rank()
    return rank
