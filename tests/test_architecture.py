"""The rules of docs/architecture.md that a machine can check: who imports whom, what an import costs, file sizes."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "fluid_npu"
MODULES = sorted(PACKAGE.rglob("*.py"))
MAX_LINES = 600

# What each package may import, besides itself. Written out, so that a new arrow is a decision and not an accident.
MAY_IMPORT = {
    "probes": set(),
    "link": set(),
    "device": set(),
    "ops": {"device"},
    "comm": {"device"},
    "schedule": {"comm", "ops", "device"},
    "mcore": {"probes", "schedule", "comm", "ops", "device"},
    "adaptor": {"probes", "mcore", "schedule", "comm", "ops", "device"},
    "report": set(),
    "train": {"probes", "adaptor", "mcore", "schedule", "comm", "ops", "device", "report"},
    "bench": {"link", "train", "adaptor", "mcore", "schedule", "comm", "ops", "device", "report"},
    "doctor": {"train", "adaptor", "ops", "device"},
    "megatron_adaptor": {"adaptor"},
    "megatron_lm": set(),
    "cluster": {"megatron_lm", "train", "adaptor"},
    "sim": {"device"},
    "order": {"comm", "device", "report"},
    "cli": {"cluster", "doctor", "bench", "train", "report", "megatron_lm", "sim", "order"},
    "__main__": {"cli"},
    "__init__": set(),
    "version": set(),
}
WITHOUT_MEGATRON = (
    "device",
    "ops",
    "comm",
    "schedule",
    "report",
    "link",
    "order",
    "cli",
    "megatron_lm",
    "__init__",
    "__main__",
    "version",
    "probes",
)


def package_of(path: Path) -> str:
    """'ops' for fluid_npu/ops/permute.py, 'cli' for fluid_npu/cli.py."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(tree: ast.AST) -> Iterator[str]:
    """The modules that a syntax tree imports, wherever it does; ``from a import b`` gives 'a.b'."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imports_of(path: Path) -> set[str]:
    return set(imports(ast.parse(path.read_text(encoding="utf-8"))))


def test_every_package_has_its_place_in_the_order() -> None:
    here = {package_of(path) for path in MODULES}
    assert here <= set(MAY_IMPORT), f"new packages need a line in MAY_IMPORT: {here - set(MAY_IMPORT)}"


def test_imports_go_downwards() -> None:
    wrong = []
    for path in MODULES:
        package = package_of(path)
        for name in imports_of(path):
            root, _, rest = name.partition(".")
            target = rest.partition(".")[0]
            if root != "fluid_npu" or target in (package, "version", "__version__"):
                continue
            if target not in MAY_IMPORT[package]:
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_the_order_has_no_cycle() -> None:
    done: set[str] = set()
    while len(done) < len(MAY_IMPORT):
        free = {name for name, below in MAY_IMPORT.items() if name not in done and below <= done}
        assert free, f"a cycle among {set(MAY_IMPORT) - done}"
        done |= free


def test_only_the_upper_packages_know_megatron() -> None:
    for path in MODULES:
        if package_of(path) in WITHOUT_MEGATRON:
            found = [name for name in imports_of(path) if name.split(".")[0] == "megatron"]
            assert not found, f"{path.relative_to(ROOT)} imports {found}"


def test_report_needs_only_the_standard_library_and_plotting() -> None:
    allowed = set(sys.stdlib_module_names) | {"matplotlib", "jinja2", "fluid_npu"}
    for path in MODULES:
        if package_of(path) == "report":
            found = {name.split(".")[0] for name in imports_of(path)}
            assert found <= allowed, f"{path.relative_to(ROOT)} imports {found - allowed}"


def test_torch_npu_is_named_in_the_device_package_alone() -> None:
    for path in MODULES:
        if package_of(path) != "device":
            found = [name for name in imports_of(path) if name.split(".")[0] == "torch_npu"]
            assert not found, f"{path.relative_to(ROOT)} imports {found}"


def top_level_imports(path: Path) -> set[str]:
    """Modules of fluid_npu whose import this module needs before it is complete."""
    names: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= set(imports(node))
    return {name for name in names if name.startswith("fluid_npu.")}


def test_modules_import_each_other_without_cycles() -> None:
    name_of = {
        path: ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in MODULES
    }
    known = set(name_of.values())
    needs = {}
    for path, name in name_of.items():
        found = {full if full in known else full.rpartition(".")[0] for full in top_level_imports(path)}
        needs[name] = (found & known) - {name}
    while needs:
        free = [name for name, below in needs.items() if not below & needs.keys()]
        assert free, f"a cycle among {sorted(needs)}"
        for name in free:
            del needs[name]


_PROBE = """
import json, os, sys, threading
environment, path, known = dict(os.environ), list(sys.path), set(sys.modules)
{statement}
heavy = {{"torch", "torch_npu", "megatron", "numpy", "matplotlib", "tokenizers", "transformer_engine"}}
print(json.dumps({{
    "heavy": sorted(heavy & {{name.split(".")[0] for name in set(sys.modules) - known}}),
    "environment": environment == dict(os.environ),
    "path": path == sys.path,
    "threads": threading.active_count(),
}}))
"""


@pytest.mark.parametrize(
    "statement",
    [
        "import fluid_npu",
        "import fluid_npu; dir(fluid_npu)",
        "import fluid_npu.adaptor",
        "from fluid_npu.cli import build_parser; build_parser().format_help()",
        "import fluid_npu.train.presets",
    ],
)
def test_importing_is_light_and_has_no_effect(statement: str, tmp_path: Path) -> None:
    code = _PROBE.format(statement=statement)
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"heavy": [], "environment": True, "path": True, "threads": 1}
    assert done.stderr == ""
    assert not list(tmp_path.iterdir())


def test_public_names_exist_and_unknown_ones_are_explained() -> None:
    import fluid_npu

    for name in fluid_npu.__all__:
        assert getattr(fluid_npu, name) is not None
    with pytest.raises(AttributeError, match=r"no attribute 'fluid'; public names: .*get_fluid_moe_layer_spec"):
        fluid_npu.fluid  # noqa: B018


def test_files_have_one_job() -> None:
    sources = [path for folder in ("fluid_npu", "tests", "scripts") for path in (ROOT / folder).rglob("*.py")]
    long = {str(path.relative_to(ROOT)): count for path in sources if (count := lines_of(path)) >= MAX_LINES}
    assert not long, f"split these files: {long}"


def lines_of(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def test_every_module_says_what_it_is_for() -> None:
    silent = [
        str(path.relative_to(ROOT))
        for path in MODULES
        if path.read_text(encoding="utf-8").strip()
        and not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert not silent
