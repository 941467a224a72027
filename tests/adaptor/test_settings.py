"""The keyword arguments of ``adapt``: in force while the features are, and the ones before come back at rollback."""

from __future__ import annotations

import pytest

from fluid_npu.adaptor import PatchError, Settings, adapt
from fluid_npu.adaptor.settings import current


def test_settings_are_in_force_while_adapted_and_the_ones_before_come_back() -> None:
    assert current() == Settings()
    outer = adapt(["moe"], gemm_fusion=True, carry_over=True)
    assert current() == Settings(gemm_fusion=True, carry_over=True)
    with adapt(["token_dispatcher"], overlap="off"):
        assert current() == Settings(overlap="off", gemm_fusion=True, carry_over=True), "what is not named stays"
    assert current() == Settings(gemm_fusion=True, carry_over=True)
    outer.rollback()
    assert current() == Settings()
    outer.rollback()
    assert current() == Settings(), "a second rollback takes nothing away"


def test_a_call_that_switches_nothing_on_still_has_its_settings() -> None:
    with adapt(["moe"]):
        again = adapt(["moe"], overlap="off")
        assert again.features == [] and current().overlap == "off"
        again.rollback()
        assert current() == Settings()


def test_settings_come_back_after_an_error_and_whatever_the_order_of_rollbacks() -> None:
    with pytest.raises(ZeroDivisionError), adapt(["moe"], overlap="off"):
        raise ZeroDivisionError
    assert current() == Settings()
    with adapt(["moe"]):
        first, second = adapt([], overlap="dw"), adapt([], overlap="off")
        first.rollback()
        assert current().overlap == "off", "the later call is still on"
        second.rollback()
        assert current() == Settings()


def test_a_refused_call_and_a_refused_rollback_change_no_setting() -> None:
    with pytest.raises(PatchError, match="unknown; allowed"):
        adapt(["no_such_feature"], overlap="off")
    with pytest.raises(PatchError, match=r"adapt\(carry_over='yes'\): allowed are True and False"):
        adapt(["moe"], carry_over="yes")
    for overlap in ("sideways", "auto"):  # refused here, and not when the first model is built
        with pytest.raises(PatchError, match=rf"adapt\(overlap='{overlap}'\): allowed are off, dw, full"):
            adapt(["moe"], overlap=overlap)
    for name, value, rule in (
        ("dispatch", "twice", "allowed are plain, once-per-rank, once-per-node, static, auto"),
        ("chunks", 0, "a number of at least 1, or 'auto'"),
        ("chunks", 2, "overlap='dw' has one; use overlap='full'"),
        ("chunks_of", "rows", "allowed are auto, tokens, experts"),
        ("chunks_of", "experts", "overlap='dw' has no chunks; use overlap='full'"),
        ("local_first", 1, "allowed are True and False"),
        ("local_first", True, "overlap='dw' has no chunks; use overlap='full'"),
        ("cuda_graph", "always", "allowed are True, False and 'auto'"),
        ("attention_chunks", True, "a number of at least 1"),
        ("attention_chunks", "two", "a number of at least 1, or 'auto'"),
        ("a2a_transport", "pigeons", "allowed are auto, collective, high-priority, peer-copy"),
        ("payload_dtype", "fp4", "allowed are same, fp8"),
        (
            "a2a_ctas",
            8,
            "a2a_transport=collective has no NCCL communicator of its own; use a2a_transport=high-pr",
        ),
        ("a2a_ctas", True, "allowed are 0, 1, 2, 4"),
        ("a2a_node_size", 4, "ranks of a node for a2a_transport 'two-level' or 'auto'"),
    ):
        with pytest.raises(PatchError, match=rf"adapt\({name}={value!r}\): {rule}"):
            adapt(["moe"], **{name: value})
    assert current() == Settings()
    first = adapt(["moe"], overlap="dw")
    second = adapt(["token_dispatcher"], overlap="off")
    with pytest.raises(PatchError, match="roll back token_dispatcher first"):
        first.rollback()
    assert current().overlap == "off"
    second.rollback()
    first.rollback()
    assert current() == Settings()


def test_the_specs_made_meanwhile_are_bound_by_the_settings_in_force() -> None:
    from fluid_npu.adaptor.moe import binder

    with adapt(["moe"], overlap="off"):
        bound = binder()
        assert binder() is bound, "one for all specs made under them"
        with adapt([], overlap="dw"):
            assert binder() is not bound


def test_allowed_is_what_a_scheduler_takes() -> None:
    from fluid_npu.adaptor import settings
    from fluid_npu.adaptor.settings import DISPATCHES, OVERLAPS, PAYLOAD_DTYPES, RECORDABLE_TRANSPORTS, TRANSPORTS
    from fluid_npu.comm.transports import (
        CollectiveTransport,
        PairwiseTransport,
        choose,
        few_ctas_transport,
        high_priority_transport,
    )
    from fluid_npu.mcore import dispatch_choice
    from fluid_npu.ops import payload_fp8
    from fluid_npu.schedule.scheduler import OVERLAP_MODES
    from fluid_npu.train import config

    assert OVERLAPS == OVERLAP_MODES
    assert DISPATCHES == dispatch_choice.DISPATCHES
    recorded = dispatch_choice.RECORDED_DISPATCHES
    assert settings.RECORDED_DISPATCHES == recorded == config.RECORDED_DISPATCHES
    assert TRANSPORTS == choose.TRANSPORTS == config.A2A_TRANSPORTS
    made = {"collective": CollectiveTransport(), "high-priority": high_priority_transport()}
    made |= {"few-ctas": few_ctas_transport(), "pairwise": PairwiseTransport()}
    recordable = tuple(name for name, transport in made.items() if getattr(transport, "recordable", False))
    assert recordable == RECORDABLE_TRANSPORTS == config.RECORDABLE_TRANSPORTS
    assert PAYLOAD_DTYPES == payload_fp8.PAYLOAD_DTYPES == config.PAYLOAD_DTYPES
