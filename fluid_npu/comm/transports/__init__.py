"""How the bytes of an AllToAll move. A transport starts an exchange and returns something to wait on."""

from fluid_npu.comm.transports.base import Landing, PendingWork, Table, Transport
from fluid_npu.comm.transports.collective import CollectiveTransport
from fluid_npu.comm.transports.delayed import DelayedTransport
from fluid_npu.comm.transports.few_ctas import carve_out, few_ctas_transport
from fluid_npu.comm.transports.high_priority import high_priority_transport
from fluid_npu.comm.transports.pairwise import PairwiseTransport
from fluid_npu.comm.transports.peer_copy import PeerCopyTransport
from fluid_npu.comm.transports.two_level import TwoLevelTransport

__all__ = [
    "CollectiveTransport",
    "DelayedTransport",
    "Landing",
    "PairwiseTransport",
    "PeerCopyTransport",
    "PendingWork",
    "Table",
    "Transport",
    "TwoLevelTransport",
    "carve_out",
    "few_ctas_transport",
    "high_priority_transport",
]
