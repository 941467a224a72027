"""Environment variables that hurt, and why. One rule a variable; what is not set is not printed, but for one.

A rule says what a value does; recipes are in the scripts. Sources: documentation of torch_npu, CANN and NCCL,
Megatron's own assertions, and measurements on two H200 (2026-11-20).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from fluid_npu.doctor.finding import Item

_CONNECTIONS = "CUDA_DEVICE_MAX_CONNECTIONS"
_EVENT_DEFAULT_S, _EXEC_DEFAULT_S = 1868, 1800
#: Printed when set although no rule complains.
_SHOWN = ("HCCL_", "NCCL_", "GLOO_", "TORCH_NCCL_", "TORCH_HCCL_", "NVTE_", "FLUID_", "ASCEND_", "CUDA_", "NPU_")


@dataclass(frozen=True, kw_only=True)
class Rule:
    """``hurts(value)`` is asked when the variable is set; ``why`` completes 'VARIABLE=value: '."""

    name: str
    hurts: Callable[[str], bool]
    why: str
    fix: str
    level: str = "warn"


def _is(*values: str) -> Callable[[str], bool]:
    return lambda value: value.strip().lower() in values


def _number(test: Callable[[float], bool]) -> Callable[[str], bool]:
    """A value that is no number hurts too."""

    def hurts(value: str) -> bool:
        try:
            return test(float(value))
        except ValueError:
            return True

    return hurts


_ON = ("1", "true", "on", "yes")
_WAITS = "the host waits for each operator, so nothing is launched beside an AllToAll"
_BLOCKS = "wait() stops the host until the exchange has ended, so dW is launched too late to run beside it"

RULES = (
    Rule(name="ASCEND_LAUNCH_BLOCKING", hurts=_is(*_ON), why=_WAITS, fix="unset it; it is for debugging"),
    Rule(name="CUDA_LAUNCH_BLOCKING", hurts=_is(*_ON), why=_WAITS, fix="unset it; it is for debugging"),
    Rule(
        name="TASK_QUEUE_ENABLE",
        hurts=_is("0"),
        why="no task queue: each launch costs the host its full time",
        fix="set 1, or 2 where memory allows",
    ),
    Rule(name="TORCH_HCCL_BLOCKING_WAIT", hurts=_is(*_ON), why=_BLOCKS, fix="unset it"),
    Rule(name="TORCH_NCCL_BLOCKING_WAIT", hurts=_is(*_ON), why=_BLOCKS, fix="unset it"),
    Rule(name="NCCL_BLOCKING_WAIT", hurts=_is(*_ON), why=_BLOCKS, fix="unset it"),
    Rule(
        name="HCCL_OP_EXPANSION_MODE",
        hurts=_is("aiv"),
        why="exchanges then take vector cores from compute; documented for inference, AlltoAllV on one server",
        fix="unset it: AICPU and SDMA move the bytes without cube or vector cores",
    ),
    Rule(
        name="HCCL_EXEC_TIMEOUT",
        hurts=_is("0"),
        why="a lost rank is never noticed, the job hangs (Ascend/pytorch#54)",
        fix="set seconds, for example 1800",
    ),
    Rule(
        name="HCCL_CONNECT_TIMEOUT",
        hurts=_number(lambda seconds: not 120 <= seconds <= 7200),
        why="HCCL takes 120 to 7200 s",
        fix="set 1200, or 3600 on hundreds of NPUs",
    ),
    Rule(
        name="HCCL_BUFFSIZE",
        hurts=_number(lambda size: size < 200),
        why="below the default of 200 MB an AllToAll that is larger goes in rounds",
        fix="set the MB of one AllToAll, micro batch x sequence x hidden x top-k x bytes; each group takes twice that",
    ),
    Rule(
        name="MULTI_STREAM_MEMORY_REUSE",
        hurts=_is("0", "2"),
        why="buffers of exchanges are freed late (0) or held by references (2, not recommended by torch_npu)",
        fix="unset it (1), or 3 for earlier release",
    ),
    Rule(
        name="STREAMS_PER_DEVICE", hurts=lambda value: value not in ("8", "32"), why="torch_npu takes 8 or 32", fix="32"
    ),
    Rule(
        name="PER_STREAM_QUEUE",
        hurts=_is("1"),
        why="one queue a stream is experimental in torch_npu",
        fix="unset it, or measure both",
        level="note",
    ),
    Rule(
        name="PYTORCH_NPU_ALLOC_CONF",
        hurts=lambda value: "expandable_segments:true" not in value.lower().replace(" ", ""),
        why="uneven routing asks for other sizes every step, and fixed segments fragment",
        fix="add expandable_segments:True",
    ),
    Rule(
        name="ASCEND_GLOBAL_LOG_LEVEL",
        hurts=_is("0", "1"),
        why="debug and info write a line for every launch",
        fix="set 3 (errors)",
    ),
    Rule(
        name="HCCL_DETERMINISTIC",
        hurts=_is("true", "strict"),
        why="slower reductions; an AllToAll moves data and is deterministic without it",
        fix="unset it unless you compare runs bit by bit",
        level="note",
    ),
    Rule(
        name="NCCL_P2P_DISABLE",
        hurts=_is("1"),
        why="exchanges go through host memory: 23 GB/s where NVLink gave 239 (2 x H200)",
        fix="unset it",
    ),
    Rule(
        name="NCCL_MAX_CTAS",
        hurts=_number(lambda ctas: ctas < 4),
        why="few CTAs slow the exchange: 14 GB/s with 1, 57 with 4, 239 without the variable (2 x H200)",
        fix="set 4 or more, or measure",
    ),
    Rule(name="NCCL_IB_DISABLE", hurts=_is("1"), why="between machines NCCL falls to sockets", fix="unset it"),
    Rule(
        name="NCCL_DEBUG",
        hurts=_is("info", "trace"),
        why="NCCL prints from every rank",
        fix="set WARN",
        level="note",
    ),
    Rule(
        name="OMP_NUM_THREADS",
        hurts=_number(lambda threads: threads < 1),
        why="must be 1 or more",
        fix="set cores divided by ranks",
    ),
    Rule(
        name="NVTE_FUSED_ATTN",
        hurts=_is("0"),
        why="Transformer Engine's fused attention is off; with NVTE_FLASH_ATTN=0 too, attention is unfused",
        fix="unset it",
        level="note",
    ),
    Rule(
        name="NVTE_FLASH_ATTN",
        hurts=_is("0"),
        why="Transformer Engine's flash attention is off; with NVTE_FUSED_ATTN=0 too, attention is unfused",
        fix="unset it",
        level="note",
    ),
    Rule(
        name="NVTE_ALLOW_NONDETERMINISTIC_ALGO",
        hurts=_is("0"),
        why="Transformer Engine takes slower attention backwards",
        fix="unset it unless you compare runs bit by bit",
        level="note",
    ),
    Rule(
        name="TORCH_DEVICE_BACKEND_AUTOLOAD",
        hurts=_is("0"),
        why="import torch does not load torch_npu by itself",
        fix="import torch_npu in your script, or unset it",
        level="note",
    ),
    Rule(
        name="FLUID_FINGERPRINTS",
        hurts=_is("warn"),
        why="patches are applied to Megatron code that they were not written against",
        fix="unset it once the fingerprints agree",
    ),
)


def environment_items(environ: Mapping[str, str], *, cores: int = 1) -> list[Item]:
    """CUDA_DEVICE_MAX_CONNECTIONS, each rule that a set variable breaks, and in one line what else is set."""
    items = [connections_item(environ.get(_CONNECTIONS))]
    items += [_broken(rule, environ[rule.name]) for rule in RULES if _breaks(rule, environ)]
    items += _timeouts(environ)
    items += _threads(environ, cores)
    named = {item.name for item in items}
    rest = {name: environ[name] for name in sorted(environ) if name.startswith(_SHOWN) and name not in named}
    if rest:
        text = " ".join(f"{name}={value}" for name, value in rest.items())
        items.append(Item(name="also set", level="note", text=text))
    return items


def connections_item(value: str | None) -> Item:
    """1 and 32 both work; the difference is what Megatron asserts."""
    if value is None:
        text = "not set; before Blackwell Megatron-LM asks for 1 with tensor or context parallelism, the scripts set it"
        return Item(name=_CONNECTIONS, level="note", text=text)
    if value == "1":
        text = "1: works; kernels start in the order of their launch. Megatron's FSDP and its own EP overlap want more"
        return Item(name=_CONNECTIONS, level="ok", text=text)
    if value.isdigit() and 1 < int(value) <= 32:
        text = f"{value}: works; before Blackwell Megatron-LM refuses it with tensor or context parallelism"
        return Item(name=_CONNECTIONS, level="ok", text=text)
    text = f"{value}: CUDA takes 1 to 32"
    return Item(name=_CONNECTIONS, level="warn", text=text, fix=f"{_CONNECTIONS}=1 or 32")


def _breaks(rule: Rule, environ: Mapping[str, str]) -> bool:
    value = environ.get(rule.name, "")
    return value.strip() != "" and rule.hurts(value)


def _broken(rule: Rule, value: str) -> Item:
    return Item(name=rule.name, level=rule.level, text=f"{value}: {rule.why}", fix=rule.fix)


def _timeouts(environ: Mapping[str, str]) -> list[Item]:
    """torch_npu wants the event's timeout above HCCL's: else the watchdog ends the job before HCCL can say why."""
    names = ("HCCL_EXEC_TIMEOUT", "HCCL_EVENT_TIMEOUT")
    if not any(environ.get(name) for name in names):
        return []
    try:
        executes = int(environ.get(names[0]) or _EXEC_DEFAULT_S)
        event = int(environ.get(names[1]) or _EVENT_DEFAULT_S)
    except ValueError:
        return [Item(name=names[1], level="warn", text="timeouts must be whole seconds", fix="write digits alone")]
    if event == 0 or event > executes > 0 or executes == 0:
        return []
    text = (
        f"{event} s is not above HCCL_EXEC_TIMEOUT ({executes} s): the job ends before HCCL can say what it waited for"
    )
    return [Item(name=names[1], level="warn", text=text, fix=f"HCCL_EVENT_TIMEOUT={executes + 68}")]


def _threads(environ: Mapping[str, str], cores: int) -> list[Item]:
    value = environ.get("OMP_NUM_THREADS", "").strip()
    if not value:
        text = f"not set: on a CPU each rank starts {cores} threads (torchrun sets 1)"
        return [Item(name="OMP_NUM_THREADS", level="note", text=text)]
    if value.isdigit() and int(value) > cores:
        fix = f"OMP_NUM_THREADS={max(cores // 2, 1)} for two ranks"
        return [
            Item(name="OMP_NUM_THREADS", level="warn", text=f"{value}: more than the {cores} usable cores", fix=fix)
        ]
    return []
