"""Substitutes, patches, readiness, advice, and the screen that they make."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fluid_npu.doctor.advice import next_steps
from fluid_npu.doctor.ask import Reply
from fluid_npu.doctor.finding import Item, Section
from fluid_npu.doctor.patches import patch_items
from fluid_npu.doctor.readiness import VALUES, overlap_readiness, readiness_item
from fluid_npu.doctor.report import Report, as_json, as_text
from fluid_npu.doctor.substitutes import substitute_items

CHANGES = ["fused norms: torch's", "FusedAdam: torch's AdamW", "multi-tensor: Megatron's loops"]


def finding(name: str, state: str, changes: list[str] = CHANGES) -> dict[str, Any]:
    return {"name": name, "state": state, "detail": f"how {name} was seen", "changes": changes}


def substitutes(*findings: dict[str, Any], import_error: str = "", imported: bool = False) -> dict[str, Item]:
    reply = Reply(facts={"findings": list(findings), "import_error": import_error, "imported": imported})
    return {item.name: item for item in substitute_items(reply)}


@pytest.mark.parametrize(
    "state, level", [("apex", "ok"), ("impostor", "warn"), ("dummy", "note"), ("absent", "note"), ("other", "warn")]
)
def test_each_apex_is_told_with_what_it_changes(state: str, level: str) -> None:
    item = substitutes(finding("apex", state))["apex"]
    assert item.level == level and item.text == f"{state}: how apex was seen"
    assert item.details == tuple(CHANGES) and bool(item.fix) == (level == "warn")


def test_mindspeed_is_shown_as_it_is_after_its_import() -> None:
    items = substitutes(finding("mindspeed", "patching"), imported=True)
    assert "as seen after import mindspeed.megatron_adaptor" in items["mindspeed"].text


def test_a_mindspeed_that_does_not_import_is_a_finding() -> None:
    items = substitutes(finding("mindspeed", "installed"), import_error="ImportError: torch_npu")
    assert items["mindspeed import"].level == "warn" and "ImportError: torch_npu" in items["mindspeed import"].text


def test_a_detection_that_dies_is_a_finding() -> None:
    (item,) = substitute_items(Reply(problem="killed by SIGSEGV"))
    assert item.level == "warn" and "killed by SIGSEGV" in item.text


def row(feature: str = "cpu", **values: Any) -> dict[str, Any]:
    plain = {"target": "megatron.core.x", "manifest": "m.toml", "applied": False, "problem": None, "unreachable": []}
    return {"feature": feature, **plain, **values}


def patches(*rows: dict[str, Any], **failed: str) -> list[Item]:
    return patch_items(Reply(facts={"rows": list(rows), "failed": failed}))


def test_rows_that_fit_are_counted_by_feature() -> None:
    items = patches(row(), row(), row("moe", applied=True))
    assert [(item.name, item.level) for item in items] == [("cpu", "ok"), ("moe", "ok")]
    assert items[0].text == "2 rows fit; not applied here (m.toml)" and "1 applied" in items[1].text


def test_a_row_that_does_not_fit_is_wrong_and_named() -> None:
    counted, named = patches(row(), row(problem="the fingerprint is another one"))
    assert counted.level == named.level == "wrong" and counted.text.startswith("1 of 2 rows fit") and counted.fix
    assert named.text == "megatron.core.x: the fingerprint is another one"


def test_what_holds_the_original_is_named() -> None:
    *_, held = patches(row(unreachable=["my.module.name"]))
    assert held.level == "warn" and "my.module.name" in held.text


def test_a_feature_that_cannot_be_checked_hides_no_other() -> None:
    counted, failed = patches(row(), megatron_lm="ImportError: cannot import name 'override'")
    assert counted.level == "ok" and failed.level == "warn"
    assert (failed.name, failed.text) == (
        "megatron_lm",
        "could not be checked: ImportError: cannot import name 'override'",
    )


def test_features_that_cannot_be_checked_are_named_where_there_is_no_other() -> None:
    (item,) = patches(megatron_lm="ImportError: cannot import name 'override'")
    assert item.level == "warn" and item.name == "megatron_lm"


def test_patches_that_cannot_be_checked_are_wrong() -> None:
    (item,) = patch_items(Reply(problem="PatchError: megatron-core is not installed"))
    assert item.level == "wrong" and "PatchError" in item.text


@pytest.mark.parametrize(
    "device, count, environ, value, word",
    [
        ("npu", 8, {}, "yes", "SDMA takes no cube cores"),
        ("npu", 8, {"HCCL_OP_EXPANSION_MODE": "AIV"}, "partly", "vector cores"),
        ("npu", 8, {"ASCEND_LAUNCH_BLOCKING": "1"}, "no", "ASCEND_LAUNCH_BLOCKING=1"),
        ("npu", 1, {}, "between machines", "one NPU"),
        ("cuda", 2, {}, "partly", "0 to 3 %"),
        ("cuda", 2, {"TORCH_NCCL_BLOCKING_WAIT": "1"}, "no", "TORCH_NCCL_BLOCKING_WAIT=1"),
        ("cuda", 1, {}, "between machines", "one GPU"),
        ("cpu", 1, {}, "between machines", "loopback"),
    ],
)
def test_readiness_says_which_transport_and_why(
    device: str, count: int, environ: dict[str, str], value: str, word: str
) -> None:
    found = overlap_readiness(device, count, environ, cores=2)
    answer, reason = found
    assert answer == value in VALUES and word in reason and found.transport.startswith("collective (")
    assert readiness_item(found).level == {"yes": "ok", "no": "warn"}.get(value, "note")


def test_one_core_leaves_gloo_no_thread() -> None:
    assert "there is one core" in overlap_readiness("cpu", 1, {}, cores=1).reason


def section(*items: Item) -> Section:
    return Section(name="part", title="Part", items=items)


WRONG = Item(name="torch", level="wrong", text="not installed", fix="pip install torch")
WARN = Item(name="NCCL_DEBUG", level="warn", text="INFO: prints", fix="unset it")
OK = Item(name="Python", level="ok", text="3.11")


def test_repairs_come_first_and_nothing_else_while_something_is_wrong() -> None:
    readiness = overlap_readiness("cpu", 1, {}, cores=2)
    assert next_steps([section(OK, WARN), section(WRONG)], readiness) == [
        "torch: pip install torch",
        "NCCL_DEBUG: unset it",
        "fluid-npu doctor",
    ]
    steps = next_steps([section(OK, WARN)], readiness)
    assert steps[0] == "NCCL_DEBUG: unset it" and steps[1].startswith("fluid-npu parity")
    assert steps[-1] == "fluid-npu doctor --dtypes"


def test_every_command_that_is_advised_is_accepted_by_the_command_line() -> None:
    from fluid_npu.cli import build_parser

    for device in ("cpu", "cuda", "npu"):
        steps = next_steps([section(OK)], overlap_readiness(device, 2, {}, cores=2))
        assert steps and all(step.startswith("fluid-npu ") for step in steps)
        for step in steps:
            build_parser().parse_args(step.split()[1:])


def report(*items: Item) -> Report:
    return Report(sections=(section(*items),), overlap=overlap_readiness("cpu", 1, {}, cores=2), next=("go on",))


def test_text_and_json_say_the_same() -> None:
    made = report(OK, WARN, WRONG, Item(name="apex", level="note", text="absent", details=tuple(CHANGES)))
    text, values = as_text(made), json.loads(json.dumps(as_json(made)))
    assert values["verdict"] == "wrong" and "1 wrong (!!), 1 that may hurt (?)" in text.splitlines()[0]
    for item in values["sections"]["part"]:
        line = next(line for line in text.splitlines() if f" {item['name']} " in line)
        assert item["text"] in line and line.startswith(
            f"  {dict(ok='ok', note='--', warn=' ?', wrong='!!')[item['level']]}"
        )
        assert all(f"\n{' ' * 34}{detail}" in text for detail in item["details"])
    assert "  1. go on" in text


def test_long_texts_stay_on_the_screen() -> None:
    long = Item(name="PYTORCH_NPU_ALLOC_CONF", level="warn", text="word " * 80, fix="unset it " * 10)
    assert max(len(line) for line in as_text(report(long)).splitlines()) <= 120


def test_a_level_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="level='bad' is unknown; allowed: ok, note, warn, wrong"):
        Item(name="x", level="bad", text="")
