"""What an attention in chunks launches: nothing that the host waits for, no copy of a weight, one attention a chunk."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.context import SIZE, Case, make_config
from tests.support.op_count import is_work

pytestmark = pytest.mark.host

HEADS, KEYS, ROWS, WIDTH = 32, 8, 64, 256  # Mixtral's ratios
LOCAL = ROWS // 2
_ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"
_PRODUCTS = ("mm", "bmm", "addmm_", "addmm", "matmul", "linear")
#: A tensor of the host's numbers: on a GPU its copy to the device waits for all that was launched before.
_OF_THE_HOST = ("lift_fresh", "_local_scalar_dense", "nonzero")


class Launches(TorchDispatchMode):
    """Operators by name, and the largest result of each that only moves numbers, in elements."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: Counter[str] = Counter()
        self.moved: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out, name = func(*args, **(kwargs or {})), func.overloadpacket.__name__
        if is_work(func) or name in _OF_THE_HOST:
            self.ops[name] += 1
            if isinstance(out, torch.Tensor) and name not in _PRODUCTS:
                self.moved[name] = max(self.moved.get(name, 0), out.numel())
        return out


def launched(numbers: list[int]) -> dict[int, tuple[dict[str, Any], ...]]:
    """Of the second micro-batch of an attention in so many chunks: forward, backward."""
    return {number: _launched(number) for number in numbers}


def _launched(chunks: int) -> tuple[dict[str, Any], ...]:
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
    from megatron.core.transformer.spec_utils import build_module

    from fluid_npu.mcore.layer_spec import get_fluid_moe_layer_spec

    case = Case(heads=HEADS, key_heads=KEYS, chunks=chunks, config={"hidden_size": WIDTH})
    config = make_config(case)
    layer = build_module(
        get_fluid_moe_layer_spec(config, backend="local", attention_chunks=chunks), config=config, layer_number=1
    )
    attention, rotary = layer.self_attention, RotaryEmbedding(SIZE, 1.0)(ROWS)
    for parameter in attention.parameters():
        parameter.main_grad = torch.zeros_like(parameter)
    for _ in range(2):
        x = torch.randn(LOCAL, 1, WIDTH).requires_grad_()
        with Launches() as forward:
            y, _ = attention(x, None, rotary_pos_emb=rotary)
        dy = torch.ones_like(y)
        with Launches() as backward:
            y.backward(dy)
    return tuple({"ops": dict(found.ops), "moved": found.moved} for found in (forward, backward))


#: Most operators forward and backward, by chunks; without chunks queries and keys are turned apart.
BOUNDS = {1: (36, 36), 2: (50, 54), 4: (98, 94)}


@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 8),
    reason="torch 2.7 on a CPU computes grouped keys by other operators",
)
def test_chunks_launch_what_they_must(run_ranks: Callable[..., list[Any]]) -> None:
    sizes = {"context_parallel_size": 2, "expert_model_parallel_size": 2}
    (found, _) = run_ranks(2, launched, list(BOUNDS), sizes=sizes, env={"FLUID_ATTENTION": "torch"})
    for chunks, (forward, backward) in found.items():
        for half in (forward, backward):
            assert not set(_OF_THE_HOST) & half["ops"].keys(), f"{chunks} chunks: the host waits in {half['ops']}"
        assert forward["ops"][_ATTENTION] == backward["ops"][f"{_ATTENTION}_backward"] == chunks
        assert forward["ops"]["alltoall_base_"] == backward["ops"]["alltoall_base_"] == 2 * chunks
        assert forward["ops"]["mm"] == (1 if chunks > 1 else 2), "one output projection, of all chunks"
        assert forward["ops"].get("bmm", 0) == (chunks if chunks > 1 else 0), "one product a chunk, of a view"
        most = tuple(sum(half["ops"].values()) for half in (forward, backward))
        assert all(one <= bound for one, bound in zip(most, BOUNDS[chunks], strict=True)), (chunks, most, forward)
        if chunks > 1:
            _check_copies(chunks, forward["moved"], backward["moved"])


def _check_copies(chunks: int, forward: dict[str, int], backward: dict[str, int]) -> None:
    """None is larger than a chunk's q, k and v, but that of all chunks' outputs, which the projection reads."""
    assert forward.pop("stack") == LOCAL * HEADS * SIZE
    backward.pop("add_", None)  # of whole gradients, by autograd
    rows = LOCAL * (HEADS + 2 * KEYS) * SIZE // chunks
    for moved in (forward, backward):
        assert moved and max(moved.values()) <= rows, (chunks, rows, moved)
