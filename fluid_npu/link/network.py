"""How the ranks of one machine reach each other: over the loopback, or over a link with a rate limit.

    rank 0 [fluid0] ---- tbf ---- [port0]
                                          bridge in a namespace of its own; the job's store listens here
    rank 1 [fluid0] ---- tbf ---- [port1]

Both ends of each link shape what they send, so a rank sends and receives at no more than the rate, at the same time.
Nothing is added to the machine's own network.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from fluid_npu.link.errors import LinkError
from fluid_npu.link.namespace import Namespace
from fluid_npu.link.rate import LinkSpec
from fluid_npu.link.requirements import why_unavailable

_MTU = 9000  # as clusters set it; headers are then under 1 % of the bytes
_INTERFACE, _BRIDGE = "fluid0", "hub"
_NET, _HUB_HOST = "10.77", 1  # seen in the namespaces alone
_QUEUE_BYTES = 16 * 2**20  # nothing is dropped: what a sender may have in flight is far less
_WINDOW = "512"  # packets
T = TypeVar("T")


class Network(Protocol):
    """A context manager; functions run inside it see the network as a rank or the store does."""

    def __enter__(self) -> Any:
        """Makes the network. Raises LinkError."""

    def __exit__(self, *_: object) -> None:
        """Takes it down; the ranks must have ended."""

    def listen(self) -> socket.socket:
        """A listening socket for the job's store that every rank can reach."""

    def in_hub(self, function: Callable[[], T]) -> T:
        """Calls it where the store lives."""

    def in_rank(self, rank: int, function: Callable[[], T]) -> T:
        """Calls it where a rank lives; a process that it starts is there too."""

    def environment(self) -> dict[str, str]:
        """What a rank must know: MASTER_ADDR and the interface of gloo."""


class Loopback:
    """This machine's own network."""

    def __enter__(self) -> Loopback:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def listen(self) -> socket.socket:
        """A socket on a free port of the loopback."""
        return socket.create_server(("127.0.0.1", 0))

    def in_hub(self, function: Callable[[], T]) -> T:
        """Calls it."""
        return function()

    def in_rank(self, rank: int, function: Callable[[], T]) -> T:
        """Calls it."""
        return function()

    def environment(self) -> dict[str, str]:
        """Nothing: the launcher's own settings are for the loopback."""
        return {}


class SlowLink:
    """``ranks`` namespaces around a bridge, each link limited to the rate of ``spec`` in either direction."""

    def __init__(self, ranks: int, spec: LinkSpec) -> None:
        if not 2 <= ranks <= 250:
            raise ValueError(f"--nproc {ranks}: a link joins 2 to 250 ranks; use --nproc 2")
        self.ranks, self.spec = ranks, spec
        self._hub: Namespace | None = None
        self._places: list[Namespace] = []

    def __enter__(self) -> SlowLink:
        reason = why_unavailable()
        if reason is not None:
            raise LinkError(f"--link {self.spec.text}: {reason}")
        try:
            self._build()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the namespaces; the last ones go with the last processes in them."""
        while self._places:
            self._places.pop().close()
        if self._hub is not None:
            self._hub.close()
            self._hub = None

    def listen(self) -> socket.socket:
        """A socket in the hub's namespace, on all its addresses: the hub itself uses its loopback."""
        return self.in_hub(lambda: socket.create_server(("0.0.0.0", 0)))

    def in_hub(self, function: Callable[[], T]) -> T:
        """Calls it in the hub's namespace."""
        if self._hub is None:
            raise LinkError("the link is not up; use 'with SlowLink(...) as link:'")
        return self._hub.run(function)

    def in_rank(self, rank: int, function: Callable[[], T]) -> T:
        """Calls it in the namespace of ``rank``."""
        return self._places[rank].run(function)

    def environment(self) -> dict[str, str]:
        """MASTER_ADDR is the hub's, and gloo uses the link."""
        return {"MASTER_ADDR": f"{_NET}.0.{_HUB_HOST}", "GLOO_SOCKET_IFNAME": _INTERFACE}

    def _build(self) -> None:
        self._hub = hub = Namespace("hub")
        hub.command("ip", "link", "set", "lo", "up")
        hub.command("ip", "link", "add", _BRIDGE, "mtu", str(_MTU), "type", "bridge")
        hub.command("ip", "address", "add", f"{_NET}.0.{_HUB_HOST}/16", "dev", _BRIDGE)
        hub.command("ip", "link", "set", _BRIDGE, "up")
        for rank in range(self.ranks):
            self._places.append(Namespace(f"rank{rank}"))
            self._join(hub, self._places[rank], rank)

    def _join(self, hub: Namespace, place: Namespace, rank: int) -> None:
        port, mtu = f"port{rank}", str(_MTU)
        peer = ("peer", "name", port, "mtu", mtu, "netns", str(hub.tid))
        place.command("ip", "link", "set", "lo", "up")
        place.command("ip", "link", "add", _INTERFACE, "mtu", mtu, "type", "veth", *peer)
        place.command("ip", "address", "add", f"{_NET}.1.{rank + 1}/16", "dev", _INTERFACE)
        hub.command("ip", "link", "set", port, "master", _BRIDGE)
        for inside, device in ((place, _INTERFACE), (hub, port)):
            inside.command("tc", "qdisc", "add", "dev", device, "root", *self._shaper())
            inside.command("ip", "link", "set", device, "up")
        # A window that is open from the start and after a pause, as a training job's network has it.
        route = ("ip", "route", "replace", f"{_NET}.0.0/16", "dev", _INTERFACE)
        place.command(*route, "initcwnd", _WINDOW, "initrwnd", _WINDOW)

    def _shaper(self) -> tuple[str, ...]:
        # The bucket holds a millisecond: what passes at once after a pause must not show in a transfer of some.
        burst = max(2 * _MTU, self.spec.bits_per_s // 8 // 1000)
        rate = f"{self.spec.bits_per_s}bit"
        return ("tbf", "rate", rate, "burst", str(burst), "limit", str(max(_QUEUE_BYTES, 4 * burst)))


def make_network(ranks: int, link: LinkSpec | None) -> Network:
    """A slow link where one is asked for, otherwise the loopback. Enter it with ``with``."""
    return Loopback() if link is None else SlowLink(ranks, link)
