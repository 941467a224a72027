"""Environment variables of an NPU job: which contradict each other, and which undo the overlap.

Facts are those of CANN's and torch_npu's documents (HCCL environment reference; ProcessGroupHCCL.cpp and
OptionsManager.cpp of torch_npu); docs/CLUSTERS.md has the table with the reason of each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from fluid_npu.cluster.memory import exchange_bytes
from fluid_npu.cluster.plan import Plan
from fluid_npu.cluster.problem import ERROR, WARNING, Problem

Environment = Mapping[str, str]
MIB = 2**20

HCCL_BUFFSIZE = 200  # MiB, HCCL's default
EXEC_TIMEOUT = 1800  # s, HCCL_EXEC_TIMEOUT of CANN 6.0.1; newer defaults were not found
EVENT_TIMEOUT = 1868  # s, HCCL_EVENT_TIMEOUT of torch_npu


def check(plan: Plan, env: Environment) -> list[Problem]:
    """Every problem of the environment for this plan."""
    problems = list(_not_numbers(env))
    if not problems:
        problems = [problem for rule in RULES for problem in rule(plan, env)]
    return problems


_NUMBERS = {
    "HCCL_CONNECT_TIMEOUT": (120, 7200, "seconds"),
    "HCCL_EXEC_TIMEOUT": (0, 2**31, "seconds"),
    "HCCL_EVENT_TIMEOUT": (0, 2**31, "seconds"),
    "HCCL_BUFFSIZE": (1, 2**20, "MiB"),
    "HCCL_IF_BASE_PORT": (1024, 65520, "a port"),
    "TASK_QUEUE_ENABLE": (0, 2, "0, 1 or 2"),
    "MULTI_STREAM_MEMORY_REUSE": (0, 3, "0 to 3"),
    "CUDA_DEVICE_MAX_CONNECTIONS": (1, 32, "a number of queues"),
}


def _not_numbers(env: Environment) -> Iterator[Problem]:
    for name, (least, most, unit) in _NUMBERS.items():
        value = env.get(name)
        if value is None:
            continue
        if not value.isdigit() or not least <= int(value) <= most:
            rule = f"must be a whole number from {least} to {most} ({unit})"
            yield _problem(name, value, rule, f"export {name}={least if least > 1 else 1}, or unset it")


def timeouts(plan: Plan, env: Environment) -> Iterator[Problem]:
    """torch_npu waits on an event longer than HCCL on a collective, else the wrong one reports first."""
    execution = int(env.get("HCCL_EXEC_TIMEOUT", EXEC_TIMEOUT))
    event = env.get("HCCL_EVENT_TIMEOUT")
    if int(event or EVENT_TIMEOUT) <= execution and int(event or 1) != 0:
        rule = f"must be above HCCL_EXEC_TIMEOUT {execution}: the event gives up before the collective can report"
        fix = f"export HCCL_EVENT_TIMEOUT={execution + 68}"
        yield _problem("HCCL_EVENT_TIMEOUT", event or f"(default {EVENT_TIMEOUT})", rule, fix)


def buffer(plan: Plan, env: Environment) -> Iterator[Problem]:
    """HCCL's buffer should hold a whole collective: ceil(MBS x S x H x bytes / MiB), and an AllToAll's largest side."""
    size = int(env.get("HCCL_BUFFSIZE", HCCL_BUFFSIZE))
    width = 2 if {"--bf16", "--fp16"} & set(plan.args.values) else 4
    activation = plan.micro_batch * plan.sequence * plan.size("--hidden-size") * width
    exchange = exchange_bytes(plan) if plan.ep > 1 else 0
    needed = -(-max(activation, exchange) // MIB)
    if size < needed:
        what = "dispatch of the busiest rank" if exchange >= activation else "activation"
        rule = f"the {what} is {needed} MiB; a larger collective goes through the buffer in pieces and slows"
        given = env.get("HCCL_BUFFSIZE", f"(default {HCCL_BUFFSIZE})")
        yield _problem("HCCL_BUFFSIZE", given, rule, f"export HCCL_BUFFSIZE={-(-needed // 100) * 100}")


def launch_blocking(plan: Plan, env: Environment) -> Iterator[Problem]:
    """Switches that make the host wait for each operator or collective."""
    names = ("ASCEND_LAUNCH_BLOCKING", "TORCH_HCCL_BLOCKING_WAIT", "HCCL_BLOCKING_WAIT")
    for name in names:
        if env.get(name, "0") not in ("", "0") and plan.overlap != "off":
            rule = f"the host waits for the device, so that --fluid-overlap {plan.overlap} hides nothing"
            yield _problem(name, env[name], rule, f"export {name}=0, or --fluid-overlap off")
    if env.get("TASK_QUEUE_ENABLE") == "0" and plan.overlap != "off":
        rule = "operators are issued one by one from Python, late for an overlap"
        yield _problem("TASK_QUEUE_ENABLE", "0", rule, "export TASK_QUEUE_ENABLE=2", level=WARNING)


def connections(plan: Plan, env: Environment) -> Iterator[Problem]:
    """Megatron asserts it with TP or CP above 1 (training/arguments.py), whatever the device."""
    value = env.get("CUDA_DEVICE_MAX_CONNECTIONS")
    if value != "1" and (plan.tp > 1 or plan.cp > 1):
        rule = f"Megatron refuses --tensor-model-parallel-size {plan.tp} --context-parallel-size {plan.cp} without 1"
        fix = "export CUDA_DEVICE_MAX_CONNECTIONS=1"
        yield _problem("CUDA_DEVICE_MAX_CONNECTIONS", value or "(not set)", rule, fix)


def expansion_mode(plan: Plan, env: Environment) -> Iterator[Problem]:
    """AIV runs collectives on the vector cores, and its AlltoAllV stays inside one server."""
    if env.get("HCCL_OP_EXPANSION_MODE") == "AIV" and plan.ep > 1 and plan.overlap != "off":
        rule = "takes cores from the computation it should hide behind, and AlltoAllV works in one server only"
        fix = "unset HCCL_OP_EXPANSION_MODE, or export HCCL_OP_EXPANSION_MODE=AI_CPU (A3)"
        yield _problem("HCCL_OP_EXPANSION_MODE", "AIV", rule, fix)


def ports(plan: Plan, env: Environment) -> Iterator[Problem]:
    """HCCL listens on a run of ports from its base; torchrun's store must not lie in it."""
    if "HCCL_IF_BASE_PORT" not in env:
        return
    base, port = int(env["HCCL_IF_BASE_PORT"]), plan.cluster.master_port
    last = base + 2 * plan.cluster.per_node - 1
    if base <= port <= last:
        rule = f"HCCL_IF_BASE_PORT {base} reserves {base} to {last} on every node"
        yield _problem("MASTER_PORT", str(port), rule, f"use MASTER_PORT={base - 1000 if base > 2024 else last + 1}")


def memory_reuse(plan: Plan, env: Environment) -> Iterator[Problem]:
    """2 drops the record of streams that use a buffer; torch_npu advises against it."""
    if env.get("MULTI_STREAM_MEMORY_REUSE") == "2":
        rule = "buffers of a collective in flight live by references alone; torch_npu advises against it"
        yield _problem("MULTI_STREAM_MEMORY_REUSE", "2", rule, "export MULTI_STREAM_MEMORY_REUSE=1", level=WARNING)


RULES: tuple[Callable[[Plan, Environment], Iterator[Problem]], ...] = (
    *(timeouts, buffer, launch_blocking, connections),
    *(expansion_mode, ports, memory_reuse),
)


def _problem(name: str, value: str, rule: str, fix: str, level: str = ERROR) -> Problem:
    return Problem(kind="environment", flag=name, value=value, rule=rule, fix=fix, level=level)
