"""docs/DTYPES.md and docs/DOCTOR.md say what the code says."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from fluid_npu.adaptor.dtypes_sources import LINES
from fluid_npu.doctor.dtypes import SENTENCE
from fluid_npu.doctor.environment import RULES
from fluid_npu.doctor.finding import Item
from fluid_npu.doctor.readiness import VALUES, Readiness, overlap_readiness
from fluid_npu.doctor.report import Report, as_json

DOCS = Path(__file__).resolve().parents[2] / "docs"
_COLUMNS = (
    "argparse_bf16",
    "expert_fp16",
    "capability",
    "yaml_bf16",
    "grouped_mlp",
    "needs_package",
    "forward_bf16",
    "te_grouped_mlp",
    "local_sequential",
)


def test_the_table_of_proofs_is_the_one_that_the_answers_come_from() -> None:
    page = (DOCS / "DTYPES.md").read_text(encoding="utf-8")
    for line in LINES.values():
        numbers = (getattr(line, name) for name in _COLUMNS)
        cells = [line.name, line.tag, *("-" if number is None else str(number) for number in numbers)]
        assert f"| {' | '.join(cells)} |" in page
    assert f"> {SENTENCE}" in page


def test_every_variable_with_a_rule_is_documented_with_its_reason() -> None:
    page = (DOCS / "DOCTOR.md").read_text(encoding="utf-8")
    assert not [rule.name for rule in RULES if f"| `{rule.name}` | {rule.why} |" not in page]


def test_the_keys_of_the_json_are_documented() -> None:
    page = (DOCS / "DOCTOR.md").read_text(encoding="utf-8").split("## JSON")[1]
    report = Report(sections=(), overlap=overlap_readiness("cpu", 1, {}), next=())
    names = {*as_json(report), *(field.name for kind in (Item, Readiness) for field in dataclasses.fields(kind))}
    assert not [name for name in names if f"`{name}`" not in page]
    assert not [value for value in VALUES if f"`{value}`" not in (DOCS / "DOCTOR.md").read_text(encoding="utf-8")]


def test_no_page_has_a_path_of_a_machine() -> None:
    for name in ("DTYPES.md", "DOCTOR.md"):
        text = (DOCS / name).read_text(encoding="utf-8")
        assert not re.findall(r"(?<![\w.])/(?:root|home|tmp|work|usr/lib)/\S*", text)
