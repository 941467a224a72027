"""Which Adam runs is said as it is: torch's, Apex's, Transformer Engine's, or one that MindSpeed put in place."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType

import pytest
import torch
from megatron.core import optimizer as megatron_optimizer

from fluid_npu.train.optimizer import adam_in_use
from tests.support.mindspeed_case import mindspeed_case


def test_under_mindspeed_s_dummy_apex_it_is_mindspeed_s(monkeypatch: pytest.MonkeyPatch) -> None:
    with mindspeed_case(monkeypatch) as case:
        case.adaptor()
        # What Megatron's optimizer binds when it is imported now.
        monkeypatch.setattr(megatron_optimizer, "Adam", import_module("apex.optimizers").FusedAdam)
        kind, reason = adam_in_use()
    assert kind == "mindspeed"
    assert reason == "Megatron took mindspeed.features.FusedAdam for apex.optimizers.FusedAdam"


def test_a_dummy_that_came_after_megatron_s_optimizer_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with mindspeed_case(monkeypatch) as case:
        case.adaptor()
        kind, reason = adam_in_use()
    assert kind == "torch" and "MindSpeed's dummy module, planted after" in reason


@pytest.mark.parametrize(
    "module, kind",
    [("transformer_engine.pytorch.optimizers.fused_adam", "te"), ("apex.optimizers.fused_adam", "apex")],
)
def test_the_real_ones_are_named(module: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    adam = type("FusedAdam", (torch.optim.Optimizer,), {"__module__": module})
    monkeypatch.setattr(megatron_optimizer, "Adam", adam)
    assert adam_in_use().value == kind


def test_without_them_it_is_torch_s_and_an_impostor_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tuple(adam_in_use()) == ("torch", "Transformer Engine is not usable, and NVIDIA Apex is not installed")
    impostor = ModuleType("apex")
    impostor.__spec__ = import_module("importlib.util").spec_from_loader("apex", sys.__spec__.loader)
    monkeypatch.setitem(sys.modules, "apex", impostor)
    assert "PyPI's unrelated package" in adam_in_use().reason
