"""What recorded work would have counted: noted once, counted at every replay."""

from __future__ import annotations

from dataclasses import dataclass, field

from fluid_npu.comm.stats import CommStats
from fluid_npu.device.base import TimingEvent


class CommTally(CommStats):
    """Takes the place of an engine's statistics while work is recorded. Events of recorded work have no times."""

    def __init__(self) -> None:
        super().__init__()
        self.exchanges: list[tuple[str, int, int | None]] = []

    def count(self, comm_type: str, bytes_to_peers: int, plain_bytes: int | None = None) -> None:
        self.exchanges.append((comm_type, bytes_to_peers, plain_bytes))

    def timed(
        self, comm_type: str, launched: TimingEvent, reached: TimingEvent, passed: TimingEvent, serialised: bool
    ) -> None:
        """Nothing."""


@dataclass
class Tally:
    """Exchanges and tasks of one recording."""

    comm: CommTally = field(default_factory=CommTally)
    tasks: int = 0
    flops: int = 0
