"""Each layer of each device, found, missing and broken."""

from __future__ import annotations

import pytest

from fluid_npu.doctor.ask import Reply
from fluid_npu.doctor.finding import Item
from fluid_npu.doctor.hardware import cann_item, cpu_item, cuda_items, npu_items, torch_npu_item

NO_TOOL = Reply(problem="npu-smi: No such file or directory")
HOME = "/opt/cann"


def torch(build: str | None = None, gpus: int = 0, capability: int = 9) -> Reply:
    gpu = {"name": "NVIDIA H200", "gib": 140.0, "capability": capability}
    return Reply(facts={"cuda_build": build, "gpus": [gpu] * gpus, "nccl_version": "2.28.9" if gpus else ""})


def cann(text: str | None = None, home: str = HOME):
    return lambda path: text if path == f"{home}/version.cfg" else None


def by_name(items: list[Item]) -> dict[str, Item]:
    return {item.name: item for item in items}


def test_one_core_is_said_to_hide_nothing() -> None:
    assert cpu_item("A CPU", 2, 8.0).level == "ok"
    assert "nothing can be hidden" in cpu_item("A CPU", 1, 8.0).text


@pytest.mark.parametrize(
    "reply, smi, level, text",
    [
        (torch("13.0", 2), Reply(output="NVIDIA H200, 580.1\nNVIDIA H200, 580.1\n"), "ok", "2 x NVIDIA H200, 140 GiB"),
        (torch("13.0", 1, capability=7), Reply(output="V100, 580.1"), "warn", "compute capability below 8"),
        (torch("13.0"), Reply(output="NVIDIA H200, 580.1"), "wrong", "torch sees no GPU, though nvidia-smi"),
        (torch(None), Reply(output="NVIDIA H200, 580.1"), "wrong", "built without CUDA"),
        (torch(None), Reply(problem="nvidia-smi: No such file or directory"), "note", "none: this torch is built"),
        (torch("13.0"), Reply(problem="no answer within 15 s"), "note", "none: torch sees no GPU"),
    ],
)
def test_cuda_is_what_torch_and_the_driver_say_together(reply: Reply, smi: Reply, level: str, text: str) -> None:
    item = by_name(cuda_items(reply, smi))["CUDA"]
    assert item.level == level and text in item.text and bool(item.fix) == (level == "wrong")
    assert ("CUDA build of torch" in item.fix) == (level == "wrong" and reply.facts["cuda_build"] is None)


def test_a_driver_that_hangs_is_a_finding() -> None:
    item = by_name(cuda_items(torch(None), Reply(problem="no answer within 15 s")))["NVIDIA driver"]
    assert item.level == "warn" and item.text == "no answer within 15 s"


def test_a_broken_torch_leaves_the_driver() -> None:
    items = cuda_items(Reply(problem="ImportError: libcudart"), Reply(output="NVIDIA H200, 580.1"))
    assert [item.name for item in items] == ["NVIDIA driver"]


def test_a_machine_without_an_npu_has_notes_alone() -> None:
    items = npu_items(["null", "zero"], NO_TOOL, {}, None, cann())
    assert [item.level for item in items] == ["note"] * 4


def test_a_whole_npu_is_found_layer_by_layer() -> None:
    files = {
        f"{HOME}/version.cfg": "runtime_running_version=[8.2.RC1]",
        "/usr/local/Ascend/driver/version.info": "Version=25.0",
    }
    facts = {"usable": True, "reason": "", "description": "Ascend910B2, 61 GiB, 8 visible", "count": 8}
    items = by_name(
        npu_items(
            [f"davinci{number}" for number in range(8)] + ["davinci_manager"],
            Reply(output="| NPU |"),
            {"ASCEND_HOME_PATH": HOME},
            Reply(facts=facts),
            files.get,
        )
    )
    assert {item.level for item in items.values()} == {"ok"}
    assert items["NPU devices"].text == "8: /dev/davinci0 to /dev/davinci7"
    assert (
        "25.0" in items["npu-smi"].text and "8.2.RC1" in items["CANN"].text and "Ascend910B2" in items["torch_npu"].text
    )


def test_an_npu_without_its_tools_is_wrong_at_every_layer() -> None:
    items = npu_items(["davinci0"], NO_TOOL, {}, None, cann())
    assert [item.level for item in items] == ["ok", "wrong", "wrong", "wrong"]
    assert all(item.fix for item in items[1:])


@pytest.mark.parametrize(
    "environ, read, level, text",
    [
        ({}, cann(), "note", "ASCEND_HOME_PATH and ASCEND_TOOLKIT_HOME are not set"),
        ({"ASCEND_TOOLKIT_HOME": HOME}, cann("version=8.0.0"), "ok", "8.0.0 at ASCEND_TOOLKIT_HOME=/opt/cann"),
        ({"ASCEND_HOME_PATH": "/gone"}, cann(), "warn", "/gone has no version.cfg"),
        ({}, cann("8.1", "/usr/local/Ascend/ascend-toolkit/latest"), "wrong", "set_env.sh is not sourced"),
    ],
)
def test_cann_is_found_by_its_variables_and_its_version_file(environ, read, level: str, text: str) -> None:
    item = cann_item(environ, read)
    assert item.level == level and text in item.text


@pytest.mark.parametrize(
    "reply, needed, level",
    [
        (None, False, "note"),
        (None, True, "wrong"),
        (Reply(problem="ImportError: libhccl.so: cannot open shared object file"), False, "wrong"),
        (Reply(problem="killed by SIGSEGV"), True, "wrong"),
        (Reply(facts={"usable": False, "reason": "is_available() is False"}), False, "warn"),
        (Reply(facts={"usable": False, "reason": "is_available() is False"}), True, "wrong"),
    ],
)
def test_a_torch_npu_that_does_not_import_or_sees_nothing(reply: Reply | None, needed: bool, level: str) -> None:
    item = torch_npu_item(reply, needed=needed)
    assert item.level == level and bool(item.fix) == (level != "note")
