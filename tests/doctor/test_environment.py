"""Variables that hurt are named with their reason; what is harmless or not set is not."""

from __future__ import annotations

import pytest

from fluid_npu.doctor.environment import RULES, environment_items

CLEAN = {"OMP_NUM_THREADS": "1"}
#: A value that hurts for each rule, and one that does not.
PLANTED = {
    "ASCEND_LAUNCH_BLOCKING": ("1", "0"),
    "CUDA_LAUNCH_BLOCKING": ("1", "0"),
    "TASK_QUEUE_ENABLE": ("0", "2"),
    "TORCH_HCCL_BLOCKING_WAIT": ("1", "0"),
    "TORCH_NCCL_BLOCKING_WAIT": ("true", "0"),
    "NCCL_BLOCKING_WAIT": ("1", "0"),
    "HCCL_OP_EXPANSION_MODE": ("AIV", "AI_CPU"),
    "HCCL_EXEC_TIMEOUT": ("0", "1800"),
    "HCCL_CONNECT_TIMEOUT": ("60", "1200"),
    "HCCL_BUFFSIZE": ("100", "400"),
    "MULTI_STREAM_MEMORY_REUSE": ("2", "1"),
    "STREAMS_PER_DEVICE": ("16", "32"),
    "PER_STREAM_QUEUE": ("1", "0"),
    "PYTORCH_NPU_ALLOC_CONF": ("max_split_size_mb:128", "expandable_segments:True"),
    "ASCEND_GLOBAL_LOG_LEVEL": ("1", "3"),
    "HCCL_DETERMINISTIC": ("true", "false"),
    "NCCL_P2P_DISABLE": ("1", "0"),
    "NCCL_MAX_CTAS": ("1", "16"),
    "NCCL_IB_DISABLE": ("1", "0"),
    "NCCL_DEBUG": ("INFO", "WARN"),
    "OMP_NUM_THREADS": ("0", "1"),
    "NVTE_FUSED_ATTN": ("0", "1"),
    "NVTE_FLASH_ATTN": ("0", "1"),
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": ("0", "1"),
    "TORCH_DEVICE_BACKEND_AUTOLOAD": ("0", "1"),
    "FLUID_FINGERPRINTS": ("warn", "strict"),
}


def found(environ: dict[str, str], cores: int = 4) -> dict[str, object]:
    """Items by name, without the one that is always there."""
    items = {item.name: item for item in environment_items({**CLEAN, **environ}, cores=cores)}
    return {name: item for name, item in items.items() if name != "CUDA_DEVICE_MAX_CONNECTIONS"}


def test_every_rule_is_planted() -> None:
    assert {rule.name for rule in RULES} == set(PLANTED)


@pytest.mark.parametrize("name", PLANTED)
def test_a_value_that_hurts_is_named_with_its_reason_and_a_fix(name: str) -> None:
    value, harmless = PLANTED[name]
    (item,) = found({name: value}).values()
    assert item.name == name and item.level in ("warn", "note") and item.text.startswith(f"{value}: ") and item.fix
    assert name not in found({name: harmless})


def test_a_clean_environment_has_one_line() -> None:
    (item,) = environment_items(CLEAN, cores=4)
    assert item.name == "CUDA_DEVICE_MAX_CONNECTIONS" and "not set" in item.text


@pytest.mark.parametrize("value, level", [(None, "note"), ("1", "ok"), ("32", "ok"), ("64", "warn"), ("many", "warn")])
def test_one_and_thirty_two_connections_both_work_and_are_printed(value: str | None, level: str) -> None:
    environ = {} if value is None else {"CUDA_DEVICE_MAX_CONNECTIONS": value}
    item = environment_items(environ)[0]
    assert (item.name, item.level) == ("CUDA_DEVICE_MAX_CONNECTIONS", level)
    assert value is None or item.text.startswith(f"{value}: ")
    assert ("works" in item.text) == (value in ("1", "32"))


@pytest.mark.parametrize(
    "executes, event, wrong",
    [("1800", "1868", False), ("3600", None, True), ("1800", "1800", True), (None, "600", True), ("soon", None, True)],
)
def test_the_event_timeout_must_be_above_the_execution_timeout(
    executes: str | None, event: str | None, wrong: bool
) -> None:
    given = {"HCCL_EXEC_TIMEOUT": executes, "HCCL_EVENT_TIMEOUT": event}
    items = found({name: value for name, value in given.items() if value is not None})
    assert ("HCCL_EVENT_TIMEOUT" in items) == wrong


def test_threads_beyond_the_cores_and_the_missing_number_are_said() -> None:
    assert found({"OMP_NUM_THREADS": "8"}, cores=4)["OMP_NUM_THREADS"].level == "warn"
    assert environment_items({}, cores=4)[-1].text.startswith("not set: on a CPU each rank starts 4 threads")


def test_harmless_settings_of_transports_are_listed_in_one_line() -> None:
    items = found({"NCCL_SOCKET_IFNAME": "eth0", "HCCL_IF_BASE_PORT": "60000", "HOME": "/root", "NCCL_IB_DISABLE": "1"})
    assert items["also set"].text == "HCCL_IF_BASE_PORT=60000 NCCL_SOCKET_IFNAME=eth0"


def test_a_value_that_is_no_number_is_not_a_traceback() -> None:
    assert found({"HCCL_BUFFSIZE": "lots"})["HCCL_BUFFSIZE"].level == "warn"
