"""Megatron's other dispatchers with our grouped experts: as stock, announced, and refused where they cannot run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.support.dispatchers import errors_by_kind
from tests.support.moe import Case, fluid_layer

Ranks = Callable[..., list[Any]]


@pytest.mark.parametrize(("tp", "shared"), [(1, None), (1, 20), (2, None)], ids=["ep2", "shared_experts", "ep2_tp2"])
def test_allgather_and_alltoall_equal_stock(tp: int, shared: int | None, run_ranks: Ranks) -> None:
    sizes = {
        "expert_model_parallel_size": 2,
        "tensor_model_parallel_size": tp,
        "expert_tensor_parallel_size": 1,
    }
    for errors in run_ranks(2, errors_by_kind, ["allgather", "alltoall"], tp, shared, sizes=sizes):
        for kind, by_name in errors.items():
            assert len(by_name) > 8 and max(by_name.values()) <= 1e-5, (kind, by_name)


def said(kinds: list[str]) -> list[str]:
    """What building a layer with each dispatcher prints or raises."""
    import contextlib
    import io

    texts = []
    for kind in kinds:
        text = io.StringIO()
        try:
            with contextlib.redirect_stdout(text):
                fluid_layer(Case(ep=1, config={"moe_token_dispatcher_type": kind}))
        except ValueError as error:
            text.write(f"refused: {error}")
        texts.append(text.getvalue())
    return texts


def test_what_is_not_overlapped_is_said_and_what_cannot_run_is_refused(run_ranks: Ranks) -> None:
    plain, flex, sequential = run_ranks(1, said, ["allgather", "flex", "alltoall_seq"], sizes={})[0]
    assert "'allgather' is Megatron's dispatcher: grouped experts, nothing overlapped" in plain
    for message, kind, why in ((flex, "flex", "DeepEP"), (sequential, "alltoall_seq", "dropped this dispatcher")):
        assert message.startswith(f"refused: moe_token_dispatcher_type={kind!r}") and why in message, message
        assert "set --moe-token-dispatcher-type alltoall (overlapped) or one of allgather" in message
