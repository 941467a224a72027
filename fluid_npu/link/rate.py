"""What ``--link`` says: a rate as ``tc`` writes it and, after a plus, a delay: ``1gbit``, ``200mbit+2ms``."""

from __future__ import annotations

import re
from dataclasses import dataclass

_UNITS = {"kbit": 10**3, "mbit": 10**6, "gbit": 10**9}
_FORM = re.compile(r"(\d+(?:\.\d+)?)(kbit|mbit|gbit)(?:\+(\d+(?:\.\d+)?)ms)?")
_SLOWEST, _FASTEST = 10**6, 100 * 10**9


@dataclass(frozen=True)
class LinkSpec:
    """One rank's link to the others, the same in both directions.

    ``bits_per_s``: of everything on the wire. ``delay_ms``: of every exchange; it is planted in the transport
    (``comm.transports.DelayedTransport``) by whoever builds the model, because many kernels have no netem.
    """

    text: str
    bits_per_s: int
    delay_ms: float = 0.0

    def transfer_ms(self, payload_bytes: int) -> float:
        """What so many bytes need in one direction, without headers (under 1 %) and without the delay."""
        return payload_bytes * 8e3 / self.bits_per_s

    def describe(self) -> str:
        """For the row of a result."""
        text = f"{self.text.partition('+')[0]} between network namespaces of one machine (veth, tc tbf)"
        if self.delay_ms:
            text += f"; a delay of {self.delay_ms:g} ms is planted in the transport, not in the network"
        return text


def parse_link(text: str) -> LinkSpec:
    """Raises ValueError that names the flag, the value and what is allowed."""
    found = _FORM.fullmatch(text)
    if found is None:
        raise ValueError(
            f"--link {text}: not a rate; give a number with kbit, mbit or gbit and, if wanted, a delay: "
            "1gbit or 200mbit+2ms"
        )
    number, unit, delay = found.groups()
    bits = round(float(number) * _UNITS[unit])
    if not _SLOWEST <= bits <= _FASTEST:
        raise ValueError(f"--link {text}: the rate must be between 1mbit and 100gbit; try 1gbit")
    return LinkSpec(text, bits, float(delay or 0.0))
