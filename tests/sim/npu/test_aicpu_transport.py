"""AllToAlls on HCCL groups of their own, with settings that torch_npu passes to HCCL, between two ranks."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

from fluid_npu.comm.transports.choose import TransportUnavailable, choose_transport, close
from fluid_npu.device import get_device
from tests.support.exchanges import Exchange, even, tables
from tests.support.ranks import run_ranks


def _exchanges() -> list[str]:
    """Why and what was wrong."""
    npu = get_device("npu").value
    npu.set_current(int(os.environ["LOCAL_RANK"]))
    group, where = dist.new_group(backend="hccl"), npu.torch_device(int(os.environ["LOCAL_RANK"]))
    transport, reason = choose_transport("aicpu", [group], npu, bytes_to_peers=3 << 20)
    found = [reason]
    flights = [Exchange(transport, group, table, step, device=where) for step, table in enumerate(tables(2, 9, seed=8))]
    flights.append(Exchange(transport, group, even(2, 6), 9, dtype=torch.bfloat16, device=where, lists=False))
    found += [f"step {step}" for step, flight in enumerate(flights) if not flight.ok()]
    close(transport)
    try:
        choose_transport("peer-copy", [group], npu)
    except TransportUnavailable as error:
        found.append(str(error))
    return found


def test_exchanges_on_two_communicators_in_turn_give_the_right_bytes() -> None:
    for reason, *wrong, refused in run_ranks(2, _exchanges):
        assert "HCCL by AI CPU, 2 communicators a group with buffers of 8 MiB, self-check passed" in reason
        assert not wrong
        assert refused.startswith("--a2a-transport peer-copy: no copies into another NPU's memory from Python")
