"""What is told apart under the names apex, transformer_engine, mindspeed and megatron_adaptor.

Each state is planted as a package on the path of a new process; the two tests at the end ask Megatron itself whether it
does what ``changes`` says.
"""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fluid_npu import probes
from fluid_npu.adaptor.providers.detect import detect_all

# What MindSpeed's Patch.parse_path makes of a module that cannot be imported.
DUMMY = """
import sys, types
from importlib.machinery import ModuleSpec
def dummy(name):
    module = sys.modules[name] = types.ModuleType(name)
    module.__file__, module.__spec__ = "mindspeed.dummy_module.py", ModuleSpec(name, None)
    parent, _, child = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], child, module)
    return module
"""
NVIDIA = {
    "apex/__init__.py": "raise AssertionError('imported')",
    "apex/optimizers/__init__.py": "",
    "apex/normalization/__init__.py": "",
    "apex-0.1.dist-info/METADATA": "Metadata-Version: 2.1\nName: apex\nVersion: 0.1\n",
}
PYPI = {
    "apex/__init__.py": "from pyramid_mailer.interfaces import IMailer",
    "apex/lib/libapex.py": "",
    "apex/views.py": "",
    "apex-0.9.10.dev0.dist-info/METADATA": "Metadata-Version: 2.1\nName: apex\nVersion: 0.9.10.dev0\n",
}
MINDSPEED = {
    "mindspeed/__init__.py": "",
    "mindspeed/patch_utils.py": """
class MindSpeedPatchesManager:
    patches_info = {}
""",
}


def run(code: str, files: dict[str, str], tmp_path: Path) -> Any:
    """The JSON that ``code`` prints in a new process with ``files`` on its path."""
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    command = f"import sys, json; sys.path.insert(0, {str(tmp_path)!r})\n{code}"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def detect(name: str, files: dict[str, str], tmp_path: Path, before: str = "") -> dict[str, Any]:
    """The finding for ``name``; nothing that was not imported before may be imported by looking."""
    code = f"""
{before}
from dataclasses import asdict
from fluid_npu.adaptor.providers.detect import detect_{name}
known = set(sys.modules)
finding = asdict(detect_{name}())
new = {{module.partition(".")[0] for module in set(sys.modules) - known}}
finding["imported"] = sorted(new & {{"apex", "transformer_engine", "mindspeed", "megatron_adaptor", "torch"}})
print(json.dumps(finding))
"""
    found: dict[str, Any] = run(code, files, tmp_path)
    assert found.pop("imported") == []
    return found


def said(finding: dict[str, Any], word: str) -> str:
    """The one sentence among the changes that is about ``word``."""
    (line,) = [line for line in finding["changes"] if line.startswith(word)]
    return str(line)


def test_nvidia_apex(tmp_path: Path) -> None:
    found = detect("apex", {**NVIDIA, "amp_C.py": ""}, tmp_path)
    assert (found["state"], found["detail"]) == ("apex", "NVIDIA Apex 0.1 with its CUDA extensions (amp_C)")
    assert "FusedLayerNorm with Apex's kernels" in said(found, "fused norms")
    assert "amp_C" in said(found, "multi-tensor")


def test_nvidia_apex_without_its_extensions(tmp_path: Path) -> None:
    found = detect("apex", NVIDIA, tmp_path)
    assert found["state"] == "apex"
    assert "Python part only (no amp_C)" in found["detail"]
    assert "requires cuda extensions" in said(found, "FusedAdam")


def test_the_apex_of_pypi_is_another_project(tmp_path: Path) -> None:
    found = detect("apex", PYPI, tmp_path)
    assert found["state"] == "impostor"
    assert "0.9.10.dev0" in found["detail"] and "pip uninstall apex" in found["detail"]
    assert "torch.optim.AdamW" in said(found, "FusedAdam")


def test_a_single_file_named_apex_is_an_impostor_too(tmp_path: Path) -> None:
    assert detect("apex", {"apex.py": ""}, tmp_path)["state"] == "impostor"


def test_mindspeeds_dummy_apex(tmp_path: Path) -> None:
    plant = DUMMY + (
        "dummy('apex'); m = dummy('apex.optimizers')\n"
        "m.FusedAdam = type('AdamW', (), {'__module__': 'mindspeed.core.optimizer.adamw'})"
    )
    found = detect("apex", {}, tmp_path, plant)
    assert found["state"] == "dummy"
    assert said(found, "FusedAdam").endswith("mindspeed.core.optimizer.adamw.AdamW")


def test_absent_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("apex", "transformer_engine", "mindspeed", "megatron_adaptor"):
        monkeypatch.setitem(sys.modules, name, None)
    findings = list(detect_all())
    assert findings
    for finding in findings:
        assert finding.state == "absent"
        assert finding.name in finding.detail


def test_transformer_engine_states(tmp_path: Path) -> None:
    metadata = "Metadata-Version: 2.1\nName: transformer-engine\nVersion: 2.9\n"
    files = {"transformer_engine/__init__.py": "", "transformer_engine-2.9.dist-info/METADATA": metadata}
    without_torch = detect("transformer_engine", files, tmp_path)
    assert without_torch["state"] == "absent" and "without its PyTorch part" in without_torch["detail"]
    # MindSpeed wraps importlib.metadata.version; what we say must not come from it.
    lie = "import importlib.metadata as m; m.version = lambda name: '2.2.0'"
    found = detect("transformer_engine", {"transformer_engine/pytorch/__init__.py": ""}, tmp_path, lie)
    assert (found["state"], found["detail"]) == ("real", "Transformer Engine 2.9")


def test_mindspeeds_dummy_transformer_engine(tmp_path: Path) -> None:
    found = detect("transformer_engine", {}, tmp_path, DUMMY + "dummy('transformer_engine')")
    assert found["state"] == "dummy"
    assert any("backend='auto'" in line for line in found["changes"])


def test_mindspeed_states(tmp_path: Path) -> None:
    assert detect("mindspeed", {"mindspeed/__init__.py": ""}, tmp_path)["state"] == "other"
    assert detect("mindspeed", MINDSPEED, tmp_path)["state"] == "installed"
    patch = """
from mindspeed.patch_utils import MindSpeedPatchesManager as manager
from types import SimpleNamespace
manager.patches_info.update(a=SimpleNamespace(is_applied=True), b=SimpleNamespace(is_applied=False))
"""
    found = detect("mindspeed", MINDSPEED, tmp_path, patch)
    assert found["state"] == "patching" and "1 patches applied" in found["detail"]


def test_megatron_adaptor_is_the_top_level_package_alone(tmp_path: Path) -> None:
    plain = detect("megatron_adaptor", {"mindspeed/megatron_adaptor.py": ""}, tmp_path, "import mindspeed")
    assert plain["state"] == "absent"
    assert detect("megatron_adaptor", {"megatron_adaptor/__init__.py": ""}, tmp_path)["state"] == "installed"
    found = detect("megatron_adaptor", {}, tmp_path, "import megatron_adaptor")
    assert found["state"] == "imported"


def test_no_engine_of_mindspeeds_dummy_is_chosen_for_a_spec(monkeypatch: pytest.MonkeyPatch) -> None:
    from fluid_npu.mcore.layer_spec import choose_backend

    module = ModuleType("transformer_engine")
    module.__file__, module.__spec__ = probes.MINDSPEED_DUMMY_FILE, ModuleSpec("transformer_engine", None)
    monkeypatch.setitem(sys.modules, "transformer_engine", module)
    choice = choose_backend("auto")
    assert choice.value == "local" and "MindSpeed's dummy" in choice.reason


@pytest.mark.parametrize("marked", [True, False])
def test_a_module_made_by_hand_is_not_installed(marked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("transformer_engine")
    if marked:
        module.__file__ = probes.MINDSPEED_DUMMY_FILE
    monkeypatch.setitem(sys.modules, "transformer_engine", module)
    found = probes.installed("transformer_engine")
    assert found.value is False
    assert ("MindSpeed's dummy" in found.reason) == marked


def test_real_and_blocked_packages_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    assert probes.installed("pytest").value and probes.installed("wsgiref").value
    monkeypatch.setitem(sys.modules, "wsgiref", None)
    assert not probes.installed("wsgiref").value
    assert not probes.installed("no_such_package").value


ASK_MEGATRON = """
from megatron.core import optimizer
from megatron.core.models.gpt.gpt_layer_specs import LNImpl
from megatron.core.optimizer import clip_grads
from megatron.core.optimizer.distrib_optimizer import HAVE_APEX_OR_TE
from megatron.core.transformer.transformer_block import LayerNormImpl
norms, others = (LNImpl, LayerNormImpl), (optimizer.Adam, clip_grads.l2_norm_impl)
print(json.dumps([n.__name__ for n in norms] + [o.__module__ for o in others] + [HAVE_APEX_OR_TE]))
"""


@pytest.mark.nightly  # 6 s of imports in a process of its own
def test_megatron_takes_what_the_changes_of_real_apex_say(tmp_path: Path) -> None:
    files = {
        **NVIDIA,
        "apex/__init__.py": "",
        "apex/optimizers/__init__.py": "class FusedAdam: ...\nclass FusedSGD: ...",
        "apex/multi_tensor_apply.py": "def multi_tensor_applier(): ...",
        "amp_C.py": "def multi_tensor_l2norm(): ...\ndef multi_tensor_scale(): ...",
    }
    took = run(ASK_MEGATRON, files, tmp_path)
    assert took == ["FusedLayerNorm", "FusedLayerNorm", "apex.optimizers", "amp_C", True]


def test_megatron_takes_what_the_changes_of_the_impostor_say(tmp_path: Path) -> None:
    """One whose import works: the norm is believed, the optimizer and the multi-tensor functions are not."""
    took = run(ASK_MEGATRON, {**PYPI, "apex/__init__.py": ""}, tmp_path)
    assert took == ["FusedLayerNorm", "FusedLayerNorm", "torch.optim.adamw", "megatron.core.utils", False]
