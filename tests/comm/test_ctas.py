"""``--a2a-ctas``: from configuration and flags to the options of NCCL's communicators. NCCL is a stand-in here."""

from __future__ import annotations

import argparse
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from fluid_npu.bench.options import add_common_flags, add_engine_flags, make_config
from fluid_npu.comm.ctas import CTAS, CTAS_TRANSPORTS, ctas_obstacle
from fluid_npu.comm.transports import choose, few_ctas_transport, high_priority_transport, own_groups
from fluid_npu.comm.transports.choose import TRANSPORTS, TransportUnavailable, choose_transport
from fluid_npu.train.config import TrainConfig, validate
from tests.support.ranks import run_ranks


class Options:
    """Of a ProcessGroupNCCL, as torch makes them."""

    def __init__(self, is_high_priority_stream: bool = False) -> None:
        self.is_high_priority_stream = is_high_priority_stream
        self.config = SimpleNamespace(min_ctas=None, max_ctas=None)


class OldOptions:
    """Of a torch that cannot say a number of CTAs."""

    def __init__(self, is_high_priority_stream: bool = False) -> None:
        self.is_high_priority_stream = is_high_priority_stream


def _asked(name: str, ctas: int, options: type = Options) -> tuple[str, list[tuple[bool, Any, Any]]]:
    """The reason that is said, and of each communicator made: high priority, fewest and most CTAs."""
    made: list[tuple[bool, Any, Any]] = []

    def new_group(ranks: Any, backend: str, given: Any) -> Any:
        config = getattr(given, "config", SimpleNamespace(min_ctas=None, max_ctas=None))
        made.append((given.is_high_priority_stream, config.min_ctas, config.max_ctas))
        return dist.new_group(ranks, backend="gloo")

    torch_dist: Any = dist
    torch_dist.ProcessGroupNCCL = SimpleNamespace(Options=options)
    torch_dist.is_nccl_available = lambda: True
    own_groups.new_local_group = new_group
    choose._where = lambda device: torch.device("cpu")
    gpu: Any = SimpleNamespace(name="cuda")
    try:
        return choose_transport(name, [dist.group.WORLD], gpu, ctas=ctas).reason, made
    except (TransportUnavailable, ValueError) as error:
        return f"{type(error).__name__}: {error}", made


def _cases() -> dict[str, tuple[str, list[tuple[bool, Any, Any]]]]:
    found = {f"{name} {ctas}": _asked(name, ctas) for name in CTAS_TRANSPORTS for ctas in (0, 1, 16)}
    found["old torch"] = _asked("high-priority", 8, OldOptions)
    found["old torch, its own number"] = _asked("high-priority", 0, OldOptions)
    found["old torch, few"] = _asked("few-ctas", 4, OldOptions)
    found["pairwise"] = _asked("pairwise", 8)
    found["collective"] = _asked("collective", 8)
    return found


def test_the_number_reaches_the_communicator_and_is_said() -> None:
    found, other = run_ranks(2, _cases)
    assert found == other
    plain = "a communicator on a stream of high priority"
    for name, said, options in (
        ("high-priority 0", f"high-priority; {plain}, self-check", (True, None, None)),
        ("high-priority 1", f"high-priority; {plain}, with 1 CTA, self-check", (True, 1, 1)),
        ("high-priority 16", f"high-priority; {plain}, with 16 CTAs, self-check", (True, 16, 16)),
        ("few-ctas 0", "few-ctas; at most 8 CTAs, self-check", (True, 1, 8)),
        ("few-ctas 1", "few-ctas; at most 1 CTA, self-check", (True, 1, 1)),
        ("few-ctas 16", "few-ctas; at most 16 CTAs, self-check", (True, 1, 16)),
        ("old torch, its own number", f"high-priority; {plain}, self-check", (True, None, None)),
    ):
        reason, made = found[name]
        assert reason.startswith(f"--a2a-transport {said}") and made == [options], (name, reason, made)
    lacks = f"torch {torch.__version__} has no ProcessGroupNCCL.Options().config"
    assert found["old torch"] == (
        f"TransportUnavailable: --a2a-transport high-priority: {lacks}, which --a2a-ctas 8 needs (leave it out); use "
        "--a2a-transport collective or auto",
        [],
    )
    assert lacks in found["old torch, few"][0] and not found["old torch, few"][1]
    for name in ("pairwise", "collective"):
        reason, made = found[name]
        assert reason.startswith(
            f"ValueError: --a2a-ctas 8: --a2a-transport {name} has no NCCL communicator of its own"
        )
        assert not made


def test_only_transports_with_communicators_of_nccl_take_a_number() -> None:
    assert set(CTAS_TRANSPORTS) < set(TRANSPORTS)
    for name in TRANSPORTS:
        assert not ctas_obstacle(0, name), "the default is everybody's"
        assert bool(ctas_obstacle(8, name)) == (name not in CTAS_TRANSPORTS), name
    for number in (-1, 3, 65, 128, True):
        assert "allowed are 0, 1, 2, 4, 8, 16, 32, 64," in ctas_obstacle(number, "few-ctas")
    assert not any(ctas_obstacle(number, "high-priority") for number in CTAS)
    with pytest.raises(ValueError, match="ctas=-1: must not be negative"):
        high_priority_transport(-1)
    with pytest.raises(ValueError, match="ctas=0: NCCL needs one CTA at least"):
        few_ctas_transport(0)


def test_a_configuration_says_it_to_the_transport(monkeypatch: pytest.MonkeyPatch) -> None:
    from fluid_npu.device import Choice
    from fluid_npu.train import model

    asked = []

    def choose_one(wanted: str, *rest: Any, ctas: int, **more: Any) -> Choice[Any]:
        asked.append((wanted, ctas))
        return Choice(None, "")

    groups = dict.fromkeys(("get_expert_model_parallel_group", "get_context_parallel_group"), lambda: None)
    monkeypatch.setattr(model, "parallel_state", SimpleNamespace(**groups))
    monkeypatch.setattr(choose, "choose_transport", choose_one)
    model._transport(validate(TrainConfig(device="cpu", a2a_transport="few-ctas", a2a_ctas=4)))
    assert asked == [("few-ctas", 4)]


@pytest.mark.parametrize(("words", "ctas"), [([], 0), (["--a2a-transport", "high-priority", "--a2a-ctas", "8"], 8)])
def test_the_flag_reaches_the_configuration(words: list[str], ctas: int) -> None:
    from fluid_npu.train.cli import add_train_parser, config_of

    bench = argparse.ArgumentParser()
    add_engine_flags(bench)
    add_common_flags(bench)
    assert make_config(bench.parse_args(words)).a2a_ctas == ctas
    train = add_train_parser(argparse.ArgumentParser().add_subparsers())
    assert config_of(train.parse_args(words)).a2a_ctas == ctas


def test_a_form_that_names_its_own_transport_has_its_own_number() -> None:
    from fluid_npu.bench.block_impls import KINDS as BLOCKS
    from fluid_npu.bench.layer_impls import KINDS as LAYERS

    for kind in (*LAYERS.values(), *BLOCKS.values()):
        own = {"a2a_transport": "high-priority", "a2a_ctas": 8, **dict(kind.changes)}
        assert not ctas_obstacle(own["a2a_ctas"], own["a2a_transport"]), kind.name
