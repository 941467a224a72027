"""What the dtype table says of stock Megatron, held against the released wheels of the supported lines.

The wheels are where ``scripts/megatron_lines.py install`` unpacks them; from 0.18 on they have the argument parser too.
"""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from fluid_npu.adaptor.dtypes import line_of, supported_lines
from fluid_npu.adaptor.dtypes_sources import BACKENDS, EXPERTS, OLD_SPECS, YAML, Line

ROOT = Path(__file__).resolve().parents[2]


def _script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("megatron_lines", ROOT / "scripts" / "megatron_lines.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


LINES = _script()


@pytest.fixture(params=LINES.VERSIONS)
def stock(request: pytest.FixtureRequest) -> tuple[Line, Path]:
    """What the table says of a version, and the folder of its wheel."""
    folder = LINES.folder(request.param)
    assert folder.is_dir(), f"{folder} is missing: python scripts/megatron_lines.py install {request.param}"
    return line_of(request.param), folder


def tree(folder: Path, path: str) -> ast.Module:
    return ast.parse((folder / path).read_text(encoding="utf-8"))


def find(body: list[ast.stmt], name: str) -> ast.ClassDef | ast.FunctionDef | None:
    kinds = (ast.ClassDef, ast.FunctionDef)
    return next((node for node in body if isinstance(node, kinds) and node.name == name), None)


def number(node: ast.AST | None) -> int | None:
    return getattr(node, "lineno", None)


def assertions(node: ast.AST | None) -> dict[str, int]:
    """Message to line of each assertion in a function."""
    found = [each for each in ast.walk(node) if isinstance(each, ast.Assert)] if node else []
    return {ast.unparse(each.msg): each.lineno for each in found if each.msg is not None}


def test_every_supported_line_has_its_wheel_checked() -> None:
    assert set(supported_lines()) <= {line_of(version).name for version in LINES.VERSIONS}


def test_the_classes_stand_where_the_table_says_or_are_gone(stock: tuple[Line, Path]) -> None:
    line, folder = stock
    body = tree(folder, EXPERTS).body
    legacy = find(body, "GroupedMLP")
    assert number(legacy) == line.grouped_mlp
    assert number(find(body, "TEGroupedMLP")) == line.te_grouped_mlp
    assert (line.grouped_mlp is None) == (int(line.name.split(".")[1]) >= 17)


def test_the_legacy_forward_asserts_bf16_in_0_16_alone(stock: tuple[Line, Path]) -> None:
    line, folder = stock
    legacy = find(tree(folder, EXPERTS).body, "GroupedMLP")
    found = assertions(find(legacy.body, "forward")) if legacy else {}
    about_bf16 = {message: at for message, at in found.items() if "bf16" in message}
    expected = {"'Currently GroupedMLP for MoE only supports bf16.'": line.forward_bf16} if line.forward_bf16 else {}
    assert about_bf16 == expected and bool(expected) == (line.name == "0.16")


def test_the_legacy_class_needs_the_cuda_package(stock: tuple[Line, Path]) -> None:
    line, folder = stock
    text = (folder / EXPERTS).read_text(encoding="utf-8").splitlines()
    if line.needs_package is None:
        assert not [row for row in text if "grouped_gemm_is_available" in row]
    else:
        assert "assert_grouped_gemm_is_available()" in text[line.needs_package - 1]


def test_the_local_spec_ignores_the_flag_where_the_table_says(stock: tuple[Line, Path]) -> None:
    line, folder = stock
    if line.name == "0.12":  # no providers yet: the class is chosen here
        assert "expert_module = GroupedMLP" in (folder / OLD_SPECS).read_text(encoding="utf-8").splitlines()[51]
        return
    provider = find(tree(folder, BACKENDS).body, "LocalSpecProvider")
    chooser = find(provider.body, "grouped_mlp_modules") if provider else None
    assert isinstance(chooser, ast.FunctionDef)
    used = {node.id for statement in chooser.body for node in ast.walk(statement) if isinstance(node, ast.Name)}
    ignored = "moe_use_grouped_gemm" not in used
    assert ignored == (line.local_sequential is not None) and "SequentialMLP" in used
    assert number(chooser) == line.local_sequential if ignored else "GroupedMLP" in used


def test_the_parser_asks_for_a_cuda_device_and_for_bf16_in_yaml_alone(stock: tuple[Line, Path]) -> None:
    line, folder = stock
    in_wheel = (folder / line.arguments).is_file()
    assert in_wheel == (int(line.name.split(".")[1]) >= 18)
    if not in_wheel:
        return
    parser, yaml, start = (
        (folder / path).read_text(encoding="utf-8").splitlines() for path in (line.arguments, YAML, line.initialize)
    )
    assert line.argparse_bf16 is None and line.yaml_bf16 is not None
    assert not [row for row in parser if "only supports bf16" in row or "not supported with fp16 training" in row]
    assert "only supports bf16 dtype" in yaml[line.yaml_bf16 - 1]
    assert "torch.cuda.get_device_capability()" in parser[line.capability - 1]
    assert "Megatron requires CUDA." in start[line.needs_cuda - 1]


def test_the_installed_megatron_refuses_fp32_as_the_table_says() -> None:
    import megatron.core
    from megatron.core.transformer.moe import experts

    line = line_of(megatron.core.__version__)
    assert line.forward_bf16 is not None, "written for 0.16, the line that the tests install"
    stub = SimpleNamespace(config=SimpleNamespace(bf16=False))
    with pytest.raises(AssertionError, match="Currently GroupedMLP for MoE only supports bf16."):
        experts.GroupedMLP.forward(stub, None, None, None)
