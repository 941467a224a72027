"""What replacements may read while a feature is on: the keyword arguments of ``adapt``.

They are process-wide, as the patches are, and the ones before come back when the adaptation is rolled back.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from fluid_npu.adaptor.patch import PatchError
from fluid_npu.comm.ctas import ctas_obstacle

#: As the scheduler's OVERLAP_MODES, the dispatcher's DISPATCHES, the payload's PAYLOAD_DTYPES and the transports'
#: TRANSPORTS, which cannot be read without torch; a test holds them equal.
OVERLAPS = ("off", "dw", "full")
DISPATCHES = ("plain", "once-per-rank", "once-per-node", "static", "auto")
PAYLOAD_DTYPES = ("same", "fp8")
TRANSPORTS = ("auto", "collective", "high-priority", "peer-copy", "few-ctas", "aicpu", "pairwise", "two-level")
#: Dispatches of layers that can be recorded.
RECORDED_DISPATCHES = ("static", "once-per-rank")
CHUNKS_OF = ("auto", "tokens", "experts")
#: Transports whose exchanges a CUDA graph may hold.
RECORDABLE_TRANSPORTS = ("collective", "high-priority", "few-ctas")
#: Settings that say which transport, and of what.
OF_TRANSPORT = ("a2a_transport", "a2a_node_size", "a2a_ctas", "a2a_bytes", "device")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """``overlap``, ``carry_over``, ``dispatch``, ``chunks``, ``chunks_of``, ``local_first``, ``attention_chunks``,
    ``payload_dtype`` and ``cuda_graph`` mean what they mean to ``get_fluid_moe_layer_spec``.

    ``gemm_fusion``: the experts' weight gradients go straight into ``main_grad``, also where the model's configuration
    has no ``gradient_accumulation_fusion``. ``a2a_transport`` moves the bytes of AllToAlls of tensors on ``device``
    ('auto': the one that is here), ``a2a_bytes`` in a usual exchange of a rank (0: not known); 'two-level' between
    nodes of ``a2a_node_size`` ranks, 0 for those of the launcher, as ``dispatch`` 'once-per-node' does;
    'high-priority' with ``a2a_ctas`` CTAs of NCCL and 'few-ctas' with so many at most, 0 for their own number.
    """

    overlap: str = "dw"
    carry_over: bool = False
    gemm_fusion: bool = False
    dispatch: str = "plain"
    chunks: int | str = "auto"
    chunks_of: str = "auto"
    local_first: bool = False
    attention_chunks: int | str = 1
    interleave_batches: bool = False
    payload_dtype: str = "same"
    cuda_graph: bool | str = False
    a2a_transport: str = "collective"
    a2a_node_size: int = 0
    a2a_ctas: int = 0
    a2a_bytes: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.overlap not in OVERLAPS:
            raise PatchError(f"adapt(overlap={self.overlap!r}): allowed are {', '.join(OVERLAPS)}")
        for name in ("carry_over", "gemm_fusion", "interleave_batches", "local_first"):
            if not isinstance(getattr(self, name), bool):
                raise PatchError(f"adapt({name}={getattr(self, name)!r}): allowed are True and False")
        if self.cuda_graph not in (True, False, "auto"):
            raise PatchError(f"adapt(cuda_graph={self.cuda_graph!r}): allowed are True, False and 'auto'")
        if self.dispatch not in DISPATCHES:
            raise PatchError(f"adapt(dispatch={self.dispatch!r}): allowed are {', '.join(DISPATCHES)}")
        if self.payload_dtype not in PAYLOAD_DTYPES:
            raise PatchError(f"adapt(payload_dtype={self.payload_dtype!r}): allowed are {', '.join(PAYLOAD_DTYPES)}")
        if self.a2a_transport not in TRANSPORTS:
            raise PatchError(f"adapt(a2a_transport={self.a2a_transport!r}): allowed are {', '.join(TRANSPORTS)}")
        by_nodes = self.a2a_transport in ("auto", "two-level") or self.dispatch in ("auto", "once-per-node")
        if self.a2a_node_size < 0 or self.a2a_node_size and not by_nodes:
            raise PatchError(
                f"adapt(a2a_node_size={self.a2a_node_size}): ranks of a node for a2a_transport 'two-level' or 'auto', "
                "or dispatch 'once-per-node' or 'auto', or 0 to ask the launcher"
            )
        no_ctas = ctas_obstacle(self.a2a_ctas, self.a2a_transport, "a2a_transport=")
        if no_ctas:
            raise PatchError(f"adapt(a2a_ctas={self.a2a_ctas!r}): {no_ctas}")
        if self.attention_chunks != "auto" and not _at_least_one(self.attention_chunks):
            raise PatchError(f"adapt(attention_chunks={self.attention_chunks!r}): a number of at least 1, or 'auto'")
        if self.local_first and self.overlap != "full":
            raise PatchError(
                f"adapt(local_first=True): overlap={self.overlap!r} has no chunks; use overlap='full', or leave it out"
            )
        self._check_chunks()

    def _check_chunks(self) -> None:
        if self.chunks_of not in CHUNKS_OF:
            raise PatchError(f"adapt(chunks_of={self.chunks_of!r}): allowed are {', '.join(CHUNKS_OF)}")
        if self.chunks_of != "auto" and self.overlap != "full":
            raise PatchError(
                f"adapt(chunks_of={self.chunks_of!r}): overlap={self.overlap!r} has no chunks; use overlap='full'"
            )
        if self.chunks_of == "tokens" and self.dispatch == "plain":
            raise PatchError(
                "adapt(chunks_of='tokens'): dispatch='plain' has chunks of experts; use dispatch='once-per-rank'"
            )
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
