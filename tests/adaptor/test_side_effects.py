"""Importing fluid_npu, and every module of it but ``megatron_adaptor``, changes nothing outside of it."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
#: ``__main__`` runs the command line; ``megatron_adaptor`` is the one import that is meant to patch.
NOT_IMPORTED = {"fluid_npu.__main__", "fluid_npu.megatron_adaptor"}
if importlib.util.find_spec("triton") is None:  # a torch for CPUs brings none, and what is written in it needs it
    KERNELS = ROOT.glob("fluid_npu/device/kernels/triton_*.py")
    WRITTEN_IN_IT = [file.stem for file in KERNELS if "\nimport triton\n" in file.read_text(encoding="utf-8")]
    NOT_IMPORTED |= {f"fluid_npu.device.kernels.{name}" for name in WRITTEN_IN_IT}
#: Loaded before, so that what they do to each other at import is not put down to us.
UPSTREAM = (
    "megatron.core.transformer.moe.moe_layer",
    "megatron.core.models.gpt.gpt_layer_specs",
    "megatron.core.optimizer",
    "megatron.core.dist_checkpointing",
    "megatron.core.distributed",
    "megatron.core.datasets.gpt_dataset",
    "torch.utils.tensorboard",
)
PROBE = """
import importlib, json, logging, os, pkgutil, signal, sys, threading, warnings
sys.path.insert(0, {root!r})
from tests.support.snapshot import changed, entries

for name in {upstream!r}:
    importlib.import_module(name)

def outside():
    signals = [str(signal.getsignal(number)) for number in signal.valid_signals()]
    names = [dict(os.environ), sys.path, os.getcwd(), signals, len(warnings.filters), threading.active_count()]
    return [repr(item) for item in names + [logging.root.handlers, sys.excepthook, sys.meta_path, sys.path_hooks]]

before, state = dict(entries(("torch", "megatron"))), outside()
import fluid_npu
names = ["fluid_npu"] + [found.name for found in pkgutil.walk_packages(fluid_npu.__path__, "fluid_npu.")]
for name in names:
    if name not in {away!r}:
        importlib.import_module(name)
now = dict(entries(("torch", "megatron")))
print(json.dumps({{"changed": changed(before, now), "outside": [a for a, b in zip(state, outside()) if a != b],
                   "applied": [state.patch.target for state in fluid_npu.adaptor.status() if state.applied],
                   "modules": len(names), "entries": len(before)}}))
"""


def test_importing_every_module_changes_nothing_in_torch_megatron_or_the_process(tmp_path: Path) -> None:
    code = PROBE.format(root=str(ROOT), upstream=UPSTREAM, away=NOT_IMPORTED)
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.pop("modules") > 100 and found.pop("entries") > 50_000
    assert found == {"changed": [], "outside": [], "applied": []}
    assert done.stdout.count("\n") == 1, "no import prints"
