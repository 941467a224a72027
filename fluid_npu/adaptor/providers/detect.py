"""Which apex, MindSpeed, Transformer Engine and MegatronAdaptor are here, and what each changes in Megatron.

Three different things answer to ``import apex``: NVIDIA's, an unrelated Pyramid toolkit of the same name on PyPI, and
the empty module that MindSpeed plants. Nothing is imported to tell them apart; what is already imported is looked at.
``changes`` were read in megatron-core 0.12.1, 0.16.1, 0.18.2 and 0.19.0, where they are the same.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib.machinery import PathFinder
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec

from fluid_npu.probes import installed, mindspeed_dummy

ADAM_ORDER = "Megatron asks Transformer Engine for it first, then apex, then torch"
NO_TE_ORDER = "unless Transformer Engine is there, which Megatron asks first"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What was found under a package's name.

    Args:
        name: the package as it is imported.
        state: one word; which ones are possible stands at each ``detect_*``.
        detail: version and how the state was seen, in one sentence.
        changes: what Megatron does differently because of it, one sentence each.
    """

    name: str
    state: str
    detail: str
    changes: tuple[str, ...] = ()


def detect_all() -> tuple[Finding, ...]:
    """All four, for doctor."""
    return detect_apex(), detect_transformer_engine(), detect_mindspeed(), detect_megatron_adaptor()


def detect_apex() -> Finding:
    """States: absent, apex (NVIDIA's), impostor (another project of that name), dummy (MindSpeed's)."""
    if mindspeed_dummy("apex"):
        return Finding(name="apex", state="dummy", detail=_dummy_detail("apex"), changes=_apex_dummy_changes())
    found = installed("apex")
    if not found.value:
        return Finding(name="apex", state="absent", detail=found.reason, changes=_APEX_ABSENT)
    if not _has("apex", "optimizers", "normalization"):
        detail = (
            f"apex{_version('apex')} has no apex.optimizers: it is not NVIDIA's (PyPI's 'apex' is a toolkit for the "
            "Pyramid web framework); pip uninstall apex"
        )
        return Finding(name="apex", state="impostor", detail=detail, changes=_APEX_IMPOSTOR)
    if installed("amp_C").value:
        detail = f"NVIDIA Apex{_version('apex')} with its CUDA extensions (amp_C)"
        return Finding(name="apex", state="apex", detail=detail, changes=_apex_changes())
    detail = f"NVIDIA Apex{_version('apex')}, a build of the Python part only (no amp_C)"
    return Finding(name="apex", state="apex", detail=detail, changes=_APEX_PYTHON_ONLY)


def detect_transformer_engine() -> Finding:
    """States: absent, real, dummy (MindSpeed's)."""
    name = "transformer_engine"
    if mindspeed_dummy(name):
        return Finding(name=name, state="dummy", detail=_dummy_detail(name), changes=_TE_DUMMY)
    found = installed(name)
    if not found.value:
        return Finding(name=name, state="absent", detail=found.reason, changes=_TE_ABSENT)
    version = _version("transformer-engine")
    if not _has(name, "pytorch"):
        detail = f"Transformer Engine{version} without its PyTorch part (transformer_engine.pytorch)"
        return Finding(name=name, state="absent", detail=detail, changes=_TE_ABSENT)
    return Finding(name=name, state="real", detail=f"Transformer Engine{version}", changes=_TE_REAL)


def detect_mindspeed() -> Finding:
    """States: absent, other (a package of that name that is not it), installed, patching."""
    found = installed("mindspeed")
    if not found.value:
        return Finding(name="mindspeed", state="absent", detail=found.reason)
    if not _has("mindspeed", "patch_utils"):
        detail = f"mindspeed{_version('mindspeed')} has no mindspeed.patch_utils: it is not Ascend's MindSpeed"
        return Finding(name="mindspeed", state="other", detail=detail)
    module = sys.modules.get("mindspeed.patch_utils")
    patches = getattr(getattr(module, "MindSpeedPatchesManager", None), "patches_info", {})
    count = sum(1 for patch in patches.values() if getattr(patch, "is_applied", False))
    if not count:
        detail = f"MindSpeed{_version('mindspeed')}; nothing is patched: mindspeed.megatron_adaptor is not imported"
        return Finding(name="mindspeed", state="installed", detail=detail)
    detail = f"MindSpeed{_version('mindspeed')} has {count} patches applied"
    return Finding(name="mindspeed", state="patching", detail=detail, changes=_MINDSPEED)


def detect_megatron_adaptor() -> Finding:
    """States: absent, installed, imported. The top-level package, not a module of that name in ours or MindSpeed's."""
    name = "megatron_adaptor"
    found = installed(name)
    if not found.value:
        return Finding(name=name, state="absent", detail=found.reason)
    if name in sys.modules:
        detail = f"MegatronAdaptor{_version(name)} is imported; we do not know how it patches and leave it alone"
        return Finding(name=name, state="imported", detail=detail, changes=(_UNKNOWN,))
    return Finding(name=name, state="installed", detail=f"MegatronAdaptor{_version(name)}, not imported")


def _version(project: str) -> str:
    """' 1.2' or ''. Not importlib.metadata.version: MindSpeed wraps it to answer 2.2.0 for Transformer Engine."""
    try:
        return f" {distribution(project).version}"
    except PackageNotFoundError:
        return ""


def _has(package: str, *children: str) -> bool:
    """Whether the package has all these submodules, looked up in its folders without importing it."""
    spec = find_spec(package)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    return bool(folders) and all(PathFinder.find_spec(f"{package}.{name}", folders) for name in children)


def _dummy_detail(name: str) -> str:
    return f"MindSpeed's dummy module: `import {name}` succeeds although {name} is not installed"


def _owner(module: str, attribute: str) -> str | None:
    """Where the class behind ``module.attribute`` really comes from, when the module is imported."""
    found = getattr(sys.modules.get(module), attribute, None)
    return f"{found.__module__}.{found.__qualname__}" if isinstance(found, type) else None


def _apex_changes() -> tuple[str, ...]:
    return (
        "fused norms: LayerNorm of Megatron's local spec is FusedLayerNorm with Apex's kernels; RMSNorm stays torch's",
        f"FusedAdam: the optimizer is apex.optimizers.FusedAdam ({ADAM_ORDER})",
        f"multi-tensor: clip_grads and the optimizers use amp_C's l2norm and scale, {NO_TE_ORDER}",
    )


_APEX_PYTHON_ONLY = (
    "fused norms: Megatron's local spec takes FusedLayerNorm, which fails at the first forward without Apex's kernels; "
    "RMSNorm is not affected",
    "FusedAdam: Megatron takes apex.optimizers.FusedAdam, which raises 'requires cuda extensions' when it is built "
    f"({ADAM_ORDER})",
    f"multi-tensor: no amp_C, so clip_grads uses Megatron's own loops, {NO_TE_ORDER}",
)
_APEX_ABSENT = (
    "fused norms: Megatron's local spec takes torch's norms (WrappedTorchNorm)",
    f"FusedAdam: the optimizer is torch.optim.AdamW, {NO_TE_ORDER}",
    f"multi-tensor: clip_grads uses Megatron's own loops, {NO_TE_ORDER}",
)
_APEX_IMPOSTOR = (
    "fused norms: if `import apex` works (it needs Pyramid), Megatron believes it is NVIDIA's, takes FusedLayerNorm "
    "and a LayerNorm model fails with 'Apex must be installed'; if it fails, Megatron takes torch's norms",
    f"FusedAdam: the optimizer is torch.optim.AdamW, {NO_TE_ORDER}",
    f"multi-tensor: clip_grads uses Megatron's own loops, {NO_TE_ORDER}",
)


def _apex_dummy_changes() -> tuple[str, ...]:
    adam = _owner("apex.optimizers", "FusedAdam")
    return (
        "fused norms: Megatron's local spec takes FusedLayerNorm, which calls MindSpeed's function for Apex's kernel",
        f"FusedAdam: the optimizer is {adam or 'what MindSpeed put under apex.optimizers.FusedAdam'}",
        "multi-tensor: clip_grads uses MindSpeed's Python functions under the name amp_C",
        "gradient_accumulation_fusion: Megatron believes it is available; MindSpeed's kernel is called",
    )


_TE_REAL = (
    "fused norms: the transformer_engine spec takes TENorm and norms fused into linear layers",
    "FusedAdam: the optimizer is transformer_engine's FusedAdam, before apex's",
    "multi-tensor: clip_grads and the optimizers use transformer_engine's l2norm and scale",
)
_TE_DUMMY = (
    "Megatron's `import transformer_engine` succeeds, so what it guards with it is on; only the names that MindSpeed "
    "planted exist, most of them torch.nn.Module",
    "FusedAdam and multi-tensor: transformer_engine.pytorch.optimizers is not planted, so Megatron goes on to apex",
    "importlib.metadata.version('transformer-engine') answers 2.2.0",
    "fluid_npu treats it as not installed: backend='auto' takes Megatron's local modules",
)
_TE_ABSENT = ("Megatron's local spec is the only one; FusedAdam and multi-tensor come from apex or torch",)
_UNKNOWN = "unknown: `fluid-npu doctor` lists our patches; theirs are not listed"
_MINDSPEED = (
    "Megatron's modules are replaced and wrapped as its own flags say; ours go on top, see docs/PROVIDERS.md",
    "empty modules named transformer_engine, apex, amp_C, flash_attn and fused_layer_norm_cuda where they are missing",
    "torch.compile and torch.jit.script do nothing",
)
