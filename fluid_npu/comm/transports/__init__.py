"""How the bytes of an AllToAll move. A transport starts an exchange and returns something to wait on."""

from fluid_npu.comm.transports.base import PendingWork, Transport
from fluid_npu.comm.transports.collective import CollectiveTransport
from fluid_npu.comm.transports.delayed import DelayedTransport

__all__ = ["CollectiveTransport", "DelayedTransport", "PendingWork", "Transport"]
