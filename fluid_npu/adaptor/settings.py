"""What replacements may read while a feature is on: the keyword arguments of ``adapt``.

They are process-wide, as the patches are, and the ones before come back when the adaptation is rolled back.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from fluid_npu.adaptor.patch import PatchError

#: As the scheduler's OVERLAP_MODES and the dispatcher's DISPATCHES, which cannot be read without torch; a test holds
#: them equal.
OVERLAPS = ("off", "dw", "full")
DISPATCHES = ("plain", "once-per-rank", "auto")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All but ``gemm_fusion`` mean what they mean to ``get_fluid_moe_layer_spec``.

    ``gemm_fusion``: the experts' weight gradients go straight into ``main_grad``, also where the model's configuration
    has no ``gradient_accumulation_fusion``.
    """

    overlap: str = "dw"
    carry_over: bool = False
    gemm_fusion: bool = False
    dispatch: str = "plain"
    chunks: int | str = "auto"
    attention_chunks: int = 1

    def __post_init__(self) -> None:
        if self.overlap not in OVERLAPS:
            raise PatchError(f"adapt(overlap={self.overlap!r}): allowed are {', '.join(OVERLAPS)}")
        for name in ("carry_over", "gemm_fusion"):
            if not isinstance(getattr(self, name), bool):
                raise PatchError(f"adapt({name}={getattr(self, name)!r}): allowed are True and False")
        if self.dispatch not in DISPATCHES:
            raise PatchError(f"adapt(dispatch={self.dispatch!r}): allowed are {', '.join(DISPATCHES)}")
        if not _at_least_one(self.attention_chunks):
            raise PatchError(f"adapt(attention_chunks={self.attention_chunks!r}): a number of at least 1")
        self._check_chunks()

    def _check_chunks(self) -> None:
        if self.chunks == "auto":
            return
        if not _at_least_one(self.chunks):
            raise PatchError(f"adapt(chunks={self.chunks!r}): a number of at least 1, or 'auto'")
        if self.chunks != 1 and self.overlap != "full":
            raise PatchError(
                f"adapt(chunks={self.chunks}): overlap={self.overlap!r} has one; use overlap='full', or leave it out"
            )


def _at_least_one(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


_stack: list[Settings] = []


def current() -> Settings:
    """The settings in force; the defaults when nothing is adapted."""
    return _stack[-1] if _stack else Settings()


def changed(values: dict[str, Any]) -> Settings:
    """The current settings with these values. Raises PatchError for an unknown name or a value not allowed."""
    known = [field.name for field in fields(Settings)]
    for name, value in values.items():
        if name not in known:
            raise PatchError(f"adapt({name}={value!r}): unknown setting; allowed: {', '.join(known)}")
    return replace(current(), **values)


def push(settings: Settings) -> None:
    """Puts settings in force."""
    _stack.append(settings)


def remove(settings: Settings) -> None:
    """Takes the newest entry that is this object away; what lies under it is in force again."""
    for index in range(len(_stack) - 1, -1, -1):
        if _stack[index] is settings:
            del _stack[index]
            return
