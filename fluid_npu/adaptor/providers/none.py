"""The provider for a process in which nobody else patches Megatron."""

from __future__ import annotations

from fluid_npu.adaptor.providers.base import Foreign, Ours
from fluid_npu.adaptor.providers.detect import Finding


class NoProvider:
    """Finds nothing and does nothing."""

    name = "none"

    def detect(self) -> Finding:
        return Finding(name=self.name, state="none", detail="no other package patches Megatron here")

    def foreign(self) -> list[Foreign]:
        return []

    def attach(self, ours: Ours) -> None:
        return None

    def detach(self) -> None:
        return None
