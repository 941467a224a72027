"""Permute and unpermute: bit for bit Megatron-Core's own order and sums, gradients against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fluid_npu.device.kernels.torch_kernels import first_positions_by_sort, true_positions
from fluid_npu.ops import reference
from fluid_npu.ops.permute import (
    PermuteLayout,
    permute_tokens,
    permuted_probs,
    unpermute_tokens,
)
from fluid_npu.ops.reference import relative_error
from tests.support.device import agree, here, wide


def topk_map(tokens: int, experts: int, topk: int, seed: int = 0) -> torch.Tensor:
    scores = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(seed))
    return here(torch.zeros(tokens, experts, dtype=torch.bool).scatter_(1, scores.topk(topk).indices, True))


def capacity_map(tokens: int, experts: int, topk: int, capacity: int, seed: int) -> torch.Tensor:
    """A top-k map of which each expert keeps its first ``capacity`` tokens."""
    routed = topk_map(tokens, experts, topk, seed)
    return routed & (routed.cumsum(0) <= capacity)


def megatron(x, probs, routing_map, rows, drop_and_pad=False):
    from megatron.core.transformer.moe.moe_utils import permute, unpermute

    permuted, row_probs, order = permute(x, routing_map, probs=probs, num_out_tokens=rows, drop_and_pad=drop_and_pad)
    restored = unpermute(permuted * row_probs.unsqueeze(-1).to(x.dtype), order, x.shape, drop_and_pad=drop_and_pad)
    return permuted, row_probs, order, restored


def ours(x, probs, layout):
    permuted, row_probs = permute_tokens(x, layout), permuted_probs(probs, layout)
    return permuted, row_probs, unpermute_tokens(permuted * row_probs.unsqueeze(-1).to(x.dtype), layout)


def assert_same_bits_as_megatron(routing_map, layout, dtype, drop_and_pad=False):
    torch.manual_seed(1)
    tokens, experts = routing_map.shape
    x, dy = here(torch.randn(tokens, 16).to(dtype)), here(torch.randn(tokens, 16).to(dtype))
    probs = here(torch.rand(tokens, experts)) * routing_map
    inputs = [(x.clone().requires_grad_(), probs.clone().requires_grad_()) for _ in range(2)]
    m_rows, m_probs, order, m_out = megatron(*inputs[0], routing_map, layout.num_rows, drop_and_pad)
    rows, row_probs, out = ours(*inputs[1], layout)
    assert torch.equal(layout.token_of_row, order)
    assert torch.equal(rows, m_rows) and torch.equal(row_probs, m_probs) and agree(out, m_out)
    m_out.backward(dy)
    out.backward(dy)
    assert agree(inputs[1][0].grad, inputs[0][0].grad)
    assert agree(inputs[1][1].grad, inputs[0][1].grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens, experts, topk", [(32, 8, 2), (17, 8, 6), (9, 4, 1), (5, 3, 3), (1, 4, 2)])
def test_dropless_equals_megatron_bit_for_bit(tokens, experts, topk, dtype):
    routing_map = topk_map(tokens, experts, topk)
    assert_same_bits_as_megatron(routing_map, PermuteLayout.from_routing_map(routing_map, topk), dtype)
    assert_same_bits_as_megatron(routing_map, PermuteLayout.from_routing_map(routing_map), dtype)


@settings(max_examples=25)
@given(tokens=st.integers(1, 12), experts=st.integers(1, 6), density=st.floats(0, 1), seed=st.integers(0, 99))
def test_ragged_maps_equal_megatron_bit_for_bit(tokens, experts, density, seed):
    generator = torch.Generator().manual_seed(seed)
    routing_map = here(torch.rand(tokens, experts, generator=generator) < density)
    assert_same_bits_as_megatron(routing_map, PermuteLayout.from_routing_map(routing_map), torch.float32)


@settings(max_examples=25)
@given(tokens=st.integers(2, 16), experts=st.integers(2, 6), data=st.data())
def test_capacity_with_padding_equals_megatron_bit_for_bit(tokens, experts, data):
    topk = data.draw(st.integers(1, experts))
    capacity = data.draw(st.integers(1, tokens))
    routing_map = capacity_map(tokens, experts, topk, capacity, data.draw(st.integers(0, 99)))
    layout = PermuteLayout.from_capacity(routing_map, capacity)
    assert layout.num_rows == experts * capacity
    assert_same_bits_as_megatron(routing_map, layout, torch.float32, drop_and_pad=True)


def test_capacity_beyond_the_tokens_is_refused():
    with pytest.raises(ValueError, match="capacity is 5 and there are 4 tokens"):
        PermuteLayout.from_capacity(topk_map(4, 2, 1), 5)


@pytest.mark.parametrize("uniform", [True, False])
def test_gradients_equal_the_float64_loop(uniform):
    routing_map = topk_map(11, 6, 3, seed=4)
    layout = PermuteLayout.from_routing_map(routing_map, 3 if uniform else None)
    rows = reference.routed_rows(routing_map)
    x, factors = here(torch.randn(11, 8)).requires_grad_(), here(torch.randn(33, 8))
    dy = here(torch.randn(11, 8))
    y = unpermute_tokens(permute_tokens(x, layout) * factors, layout)
    y.backward(dy)
    x64 = wide(x).requires_grad_()
    y64 = reference.unpermute(reference.permute(x64, rows) * wide(factors), rows, 11)
    y64.backward(wide(dy))
    assert relative_error(y.detach(), y64.detach()) <= 1e-6
    assert relative_error(x.grad, x64.grad) <= 1e-6


def test_nobody_routed_and_no_tokens():
    for routing_map in (torch.zeros(4, 3, dtype=torch.bool), torch.zeros(0, 3, dtype=torch.bool)):
        layout = PermuteLayout.from_routing_map(here(routing_map))
        x = here(torch.randn(routing_map.shape[0], 8)).requires_grad_()
        y = unpermute_tokens(permute_tokens(x, layout), layout)
        y.sum().backward()
        assert y.shape == x.shape and torch.count_nonzero(y) == 0 and torch.count_nonzero(x.grad) == 0


def test_the_order_of_no_tokens_with_known_topk():
    layout = PermuteLayout.from_routing_map(here(torch.zeros(0, 3, dtype=torch.bool)), 2)
    assert unpermute_tokens(permute_tokens(here(torch.zeros(0, 8)), layout), layout).shape == (0, 8)


def test_the_order_found_without_a_host_wait_is_the_same():
    map_ET = topk_map(13, 5, 2).t()
    by_sort, by_nonzero = first_positions_by_sort(map_ET, 26), true_positions(map_ET, None)
    assert torch.equal(by_sort[0], by_nonzero[0]) and torch.equal(by_sort[1], by_nonzero[1])


def test_experts_of_each_token_are_known_when_topk_is():
    routing_map = topk_map(7, 5, 2)
    layout = PermuteLayout.from_routing_map(routing_map, 2)
    assert layout.experts_TK.tolist() == [row.nonzero().view(-1).tolist() for row in routing_map]
    assert PermuteLayout.from_routing_map(routing_map).experts_TK is None
    assert PermuteLayout.from_capacity(routing_map, 2).experts_TK is None
