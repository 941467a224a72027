"""Runs MindSpeed's real patches and ours in one process, without an NPU, and says what happened.

    PYTHONPATH=MEGATRON_LM_CHECKOUT python scripts/try_mindspeed.py MINDSPEED_CHECKOUT [--flags=--moe-grouped-gemm]

MindSpeed's own ``import mindspeed.megatron_adaptor`` runs whole. Only what it imports and is not installed here is
put in its place: torch_npu, acl, torchair and triton, as modules that have every name; what would run on an NPU refuses
to be called. Nothing of MindSpeed is copied into this repository. Each import order runs in a process of its own; the
exit status is 1 when a check fails. docs/PROVIDERS.md records the output.
"""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import subprocess
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

ORDERS = ("mindspeed first", "ours first")
NPU, COMPILERS = ("torch_npu", "acl"), ("torchair", "triton")
FEATURES = ("moe", "grouped_mlp", "token_dispatcher", "megatron_lm")


class Absent:
    """Something of a package that is not installed. Compilers' decorators give the function back; the rest refuses."""

    def __init__(self, name: str) -> None:
        self.__name__ = self.__qualname__ = name

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Absent(f"{self.__name__}.{name}")

    def __call__(self, *args: Any, **_kwargs: Any) -> Any:
        if self.__name__.endswith("get_cann_version"):
            return "8.3.RC1"
        if self.__name__.partition(".")[0] in COMPILERS:
            return args[0] if len(args) == 1 and inspect.isfunction(args[0]) else lambda function: function
        raise RuntimeError(f"{self.__name__} is not installed here")


class AbsentModule(ModuleType):
    """A module of such a package."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Absent(f"{self.__name__}.{name}")


class AbsentPackages(MetaPathFinder, Loader):
    """Finds them, after every other finder has failed."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: Any = None) -> ModuleSpec | None:
        if fullname.partition(".")[0] not in NPU + COMPILERS:
            return None
        return ModuleSpec(fullname, self, is_package=True, origin="not installed")

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return AbsentModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        module.__file__ = f"not_installed/{module.__name__}.py"
        module.__version__ = "0"  # too old for Megatron, which asks for triton's


def main() -> int:
    args = _arguments()
    if args.order is None:
        command = [sys.executable, __file__, args.checkout, f"--flags={args.flags}", "--order"]
        return max(subprocess.run([*command, order]).returncode for order in ORDERS)
    warnings.simplefilter("ignore")
    absent = [name for name in NPU + COMPILERS if importlib.util.find_spec(name) is None]
    sys.path.insert(0, args.checkout)
    sys.argv = ["pretrain_gpt.py", *args.flags.split()]
    import torch
    import torch._inductor.compile_fx  # torch must not take the triton below for a real one

    sys.meta_path.append(AbsentPackages())
    if "torch_npu" in absent:
        torch.npu = importlib.import_module("torch_npu.npu")
    print(f"\n=== {args.order}; not installed, put in place: {', '.join(absent) or 'nothing'}", flush=True)
    return _try(args.order)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkout", help="MindSpeed's source tree")
    parser.add_argument("--flags", default="--moe-grouped-gemm --num-experts 4", help="what MindSpeed reads from argv")
    parser.add_argument("--order", choices=ORDERS, help="one order only, in this process")
    return parser.parse_args()


def _try(order: str) -> int:
    from fluid_npu.adaptor import PatchError, providers, select
    from fluid_npu.adaptor.versions import installed_version

    importlib.import_module("megatron.core.models.gpt.gpt_layer_specs")
    features = [name for name in FEATURES if _has_rows(name)]
    print(f"megatron-core {installed_version('megatron-core')}; our features: {', '.join(features)}")
    try:
        adaptation = _start(order, features)
    except PatchError as error:
        print(f"refused: {error}")
        return 1
    manager = sys.modules["mindspeed.patch_utils"].MindSpeedPatchesManager
    rows = select(features)
    print(f"MindSpeed: {len(providers.foreign())} targets patched; ours: {len(rows)} rows")
    for meeting in providers.met(rows):
        print(f"  both on {meeting.row.target}: {meeting.how} ({', '.join(meeting.foreign.by)})")
    failed = _check("after both", _ours_on_top(rows))
    if "megatron_lm" in features:
        failed += _check("Megatron's parser has the flags of both", _flags_missing())
    sys.modules["mindspeed.megatron_adaptor"].repatch({})
    failed += _check("after MindSpeed's repatch", _ours_on_top(rows))
    adaptation.rollback()
    failed += _check("after our rollback", _only_theirs(manager, rows))
    return int(failed > 0)


def _has_rows(feature: str) -> bool:
    from fluid_npu.adaptor import PatchError, select
    from fluid_npu.adaptor.features import expand

    try:
        return bool(select(expand([feature])))
    except PatchError as error:
        print(f"  without feature {feature}: {str(error).splitlines()[0]}")
        return False


def _start(order: str, features: list[str]) -> Any:
    from fluid_npu.adaptor import adapt

    if order == "ours first":
        adaptation = adapt(features)
        importlib.import_module("mindspeed.megatron_adaptor")
        return adaptation
    importlib.import_module("mindspeed.megatron_adaptor")
    return adapt(features)


def _check(when: str, problems: list[str]) -> int:
    print(f"{when}: {'good' if not problems else 'WRONG'}")
    for problem in problems:
        print(f"  {problem}")
    return len(problems)


def _ours_on_top(rows: Sequence[Any]) -> list[str]:
    from fluid_npu.adaptor import status

    features = {row.feature for row in rows}
    problems = [
        state.problem or f"{state.patch.target} is off"
        for state in status(sorted(features))
        if state.problem or not state.applied
    ]
    return problems + (_wrong_modules() if "moe" in features else [])


def _wrong_modules() -> list[str]:
    from megatron.core.models.gpt import gpt_layer_specs

    from fluid_npu.mcore.experts import FluidGroupedMLP
    from fluid_npu.mcore.moe_layer import FluidMoELayer

    spec = gpt_layer_specs.get_gpt_layer_local_spec(num_experts=4, moe_grouped_gemm=True)
    mlp = spec.submodules.mlp
    got = (mlp.module, getattr(mlp.submodules.experts, "module", mlp.submodules.experts))
    return [] if got == (FluidMoELayer, FluidGroupedMLP) else [f"the spec names {got}"]


def _flags_missing() -> list[str]:
    from megatron.training.arguments import parse_args

    args = parse_args(ignore_unknown_args=True)
    wanted = {"ours": "fluid_overlap", "MindSpeed's": "optimization_level", "both": "gemm_gradient_accumulation_fusion"}
    return [f"{owner}: --{flag.replace('_', '-')}" for owner, flag in wanted.items() if not hasattr(args, flag)]


def _only_theirs(manager: Any, rows: Sequence[Any]) -> list[str]:
    """Every shared target holds what MindSpeed put there, every other one what Megatron has; nothing is hooked."""
    from fluid_npu.adaptor.target import resolve

    problems = []
    for row in rows:
        held = resolve(row.target).visible
        theirs = manager.patches_info.get(row.target)
        if theirs is not None and theirs.is_applied and held is not theirs.final_patch_func:
            problems.append(f"{row.target} is not MindSpeed's")
        if str(getattr(inspect.unwrap(held), "__module__", "")).startswith("fluid_npu"):
            problems.append(f"{row.target} is still ours")
    hooked = [name for name, held in vars(manager).items() if hasattr(getattr(held, "__func__", held), "__wrapped__")]
    return problems + [f"MindSpeedPatchesManager.{name} is still wrapped" for name in hooked]


if __name__ == "__main__":
    sys.exit(main())
