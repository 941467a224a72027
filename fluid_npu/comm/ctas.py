"""How many CTAs NCCL has for an exchange (``--a2a-ctas``): what may be asked for, and of which transport.

NCCL has 64 channels at most, each of which is one CTA of its kernels, and takes more for 64 without a word. Sends and
receives, of which an AllToAll is made, it puts on a power of two of them: 12 would be 16. Standard library only.
"""

from __future__ import annotations

#: 0 leaves the number to the transport.
CTAS = (0, 1, 2, 4, 8, 16, 32, 64)
#: Transports whose exchanges are kernels of NCCL in communicators of their own.
CTAS_TRANSPORTS = ("high-priority", "few-ctas")


def ctas_obstacle(ctas: int, transport: str, flag: str = "--a2a-transport ") -> str:
    """Why a transport cannot have so many CTAs, with the fix; empty where it can. ``flag`` is what names it."""
    if isinstance(ctas, bool) or ctas not in CTAS:
        return (
            f"allowed are {', '.join(map(str, CTAS))}, since NCCL exchanges on a power of two of its 64 channels; use "
            "one of them, or leave it out for the transport's own number"
        )
    if not ctas or transport in CTAS_TRANSPORTS:
        return ""
    why = "has no NCCL communicator of its own"
    if transport == "auto":
        why = "measures candidates with their own settings"
    return f"{flag}{transport} {why}; use {flag}{' or '.join(CTAS_TRANSPORTS)}"
