"""The Python recorder on CUDA: the faults that the simulated NPU's test plants, and a layer's step that is clean."""

from __future__ import annotations

import pytest
import torch

from fluid_npu.ops.dense_linear import add_dense_dw_, dense_linear
from fluid_npu.order.checker import check
from fluid_npu.order.recorder import OrderRecorder
from tests.support.order_on_npu import no_wait_before_the_side_stream, overwritten_under_the_side_stream

pytestmark = pytest.mark.cuda

FAULTS = {
    no_wait_before_the_side_stream: ("read-before-write", "aten::mm"),
    overwritten_under_the_side_stream: ("write-under-read", "aten::clone"),
}


@pytest.mark.parametrize("program", FAULTS, ids=lambda program: program.__name__)
def test_a_fault_between_streams_is_named_and_the_mended_program_is_clean(program) -> None:  # type: ignore[no-untyped-def]
    found = {}
    for good in (True, False):
        with OrderRecorder(0) as recorder:
            program(torch.cuda, good)
            torch.cuda.synchronize()
        found[good] = check({0: recorder.entries}).findings
    assert not found[True], found[True]
    kind, first = FAULTS[program]
    assert [finding.kind for finding in found[False]] == [kind]
    assert found[False][0].first.name.partition(".")[0] == first
    assert "tests/support/order_on_npu.py:" in found[False][0].second.line


def test_forward_and_backward_of_an_operator_with_its_dw_on_another_stream_are_clean() -> None:
    x = torch.randn(64, 32, device="cuda", requires_grad=True)
    w = torch.randn(16, 32, device="cuda", requires_grad=True)
    main_grad = torch.zeros(16, 32, device="cuda")
    tasks: list[tuple[torch.Tensor, torch.Tensor]] = []
    with OrderRecorder(0) as recorder:
        dense_linear(x, w, defer_dw=lambda x, dy: tasks.append((x, dy))).sum().backward()
        side, current = torch.cuda.Stream(), torch.cuda.current_stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for saved in tasks:
                add_dense_dw_(main_grad, *saved)
        current.wait_stream(side)
        torch.cuda.synchronize()
    torch.testing.assert_close(main_grad, torch.ones(64, 16, device="cuda").T @ x.detach())
    assert tasks and not check({0: recorder.entries}).findings
