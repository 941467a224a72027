"""What few-CTA groups and the carve-out do where there is no NCCL."""

from __future__ import annotations

import pytest
import torch

from fluid_npu.comm.transports import carve_out, few_ctas_transport
from fluid_npu.comm.transports.few_ctas import few_ctas_missing


def test_the_carve_out_holds_inside_and_what_was_set_before_comes_back() -> None:
    seen = []
    with carve_out(16):
        seen.append(torch._C._get_sm_carveout_experimental())
        with carve_out(0):
            seen.append(torch._C._get_sm_carveout_experimental())
        with pytest.raises(KeyError), carve_out(8):
            seen.append(torch._C._get_sm_carveout_experimental())
            raise KeyError
        seen.append(torch._C._get_sm_carveout_experimental())
    assert seen == [16, 16, 8, 16]
    assert torch._C._get_sm_carveout_experimental() is None


def test_what_is_missing_is_said() -> None:
    assert few_ctas_missing("npu") == "CTAs are NCCL's, and this device is npu"
    with pytest.raises(ValueError, match="ctas=0: NCCL needs one CTA at least"):
        few_ctas_transport(0)
