"""Where groups end, as a tensor of their device."""

from __future__ import annotations

import pytest
import torch

from fluid_npu.device.kernels.groups import GroupRows, ends_of
from tests.support.op_count import OpCount

pytestmark = pytest.mark.host


@pytest.mark.parametrize("counts", [[5], [0], GroupRows([7])])
def test_one_group_is_filled_in_by_the_device(counts: list[int]) -> None:
    """A copy of the host's numbers would wait for all work before it: a dense dW beside an exchange has one group."""
    with OpCount() as ops:
        ends = ends_of(counts, torch.device("cpu"), torch.int32)
    assert ends.tolist() == [sum(counts)] and ends.dtype == torch.int32
    assert ops.ops, "made on the host"


def test_several_groups_end_at_the_running_total() -> None:
    assert ends_of([3, 0, 4], torch.device("cpu"), torch.int64).tolist() == [3, 3, 7]
