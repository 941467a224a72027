"""Checks of the Triton kernel for rows in blocks of a fixed size, and the maps and blocks to check it with.

Part of ``triton_cases``, whose helpers they use: imported inside, because that module may run as a program.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

#: Tokens, experts of a group, experts of a token at most, and rows of each group's block (None: a closed group).
BOUNDED_TRIES: list[tuple[int, int, int, list[int | None]]] = [
    (50, 2, 3, [45, 40, 44, 50]),
    (50, 2, 3, [45, 20, None, 0]),
    (50, 4, 6, [None, 50, None]),
    (37, 4, 4, [37, 37, 37]),
    (37, 5, 6, [16, None, 37, 0, 30]),
    (70, 3, 2, [0, 0]),
    (70, 3, 2, [64, None]),
    (1, 1, 1, [1, None]),
    (300, 8, 6, [290, 280, 300, None, 150, 0, 1, 299]),
    (0, 2, 1, [0, 0]),
    (0, 2, 1, [0, None]),
]


def map_of(tokens: int, experts: int, topk: int, seed: int) -> Tensor:
    """bool [T, E]: some experts asked for more often than others, every fifth token dropped, the next partly."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(tokens, experts, generator=generator) + torch.arange(experts) / experts
    map_TE = torch.zeros(tokens, experts, dtype=torch.bool).scatter_(1, scores.topk(topk).indices, True)
    map_TE[::5] = False
    map_TE[1::5, experts // 2 :] = False
    return map_TE


def rows_in_blocks_of_a_fixed_size_are_those_of_plain_torch(device: str) -> None:
    """Every index and what is told, by their bits; then a payload and its gradients, which need room for all."""
    import fluid_npu.device as seam
    from fluid_npu.device.kernels.cuda_kernels import CudaKernels
    from fluid_npu.ops.once_bounded import bounded_groups
    from tests.support.triton_cases import close, random

    kept = seam._kernels.get(device)
    for tokens, local, topk, room_G in BOUNDED_TRIES:
        map_TE = map_of(tokens, local * len(room_G), topk, seed=tokens)
        x, p = random(tokens, 24), random(tokens, map_TE.shape[1], seed=1)
        wanted, told = bounded_groups(map_TE, topk, room_G)
        rounds = [_round(wanted, x, p)]
        seam._kernels[device] = CudaKernels()
        try:
            found, found_told = bounded_groups(map_TE.to(device), topk, room_G)
            if wanted.rows.num_rows <= 200:  # the interpreter takes its time for more
                rounds.append(_round(found, x.to(device), p.to(device)))
        finally:
            seam._kernels.pop(device, None) if kept is None else seam._kernels.update({device: kept})
        for name in ("token_of_row", "pair_index", "row_of_pair", "bag_offsets"):
            got, same = getattr(found.rows, name), getattr(wanted.rows, name)
            assert got.dtype == same.dtype and torch.equal(got.cpu(), same), (tokens, room_G, name)
        assert found_told.dtype == told.dtype == torch.int32 and torch.equal(found_told.cpu(), told), (tokens, room_G)
        assert found.map_TE is not None and wanted.map_TE is not None
        assert torch.equal(found.map_TE.cpu(), wanted.map_TE), (tokens, room_G)
        if not told[0] and tokens and len(rounds) == 2:  # of a step without room nothing is used
            for same, got in zip(*rounds, strict=True):
                close(got, same.double(), torch.float32)


def _round(layout: object, x: Tensor, p: Tensor) -> list[Tensor]:
    """What is packed of rows that were asked for, and the gradients if just that comes back."""
    from fluid_npu.ops.once import OnceLayout
    from fluid_npu.ops.payload_once import PackOnce, SlotRow

    assert isinstance(layout, OnceLayout) and layout.map_TE is not None
    row = SlotRow(hidden=x.shape[1], slots=layout.num_slots, wire=torch.float32)
    pack = PackOnce(layout, row)
    payload = pack.load(x, p)
    groups = layout.rows.num_experts
    asked = layout.map_TE.view(x.shape[0], groups, layout.local).any(2).view(-1)[layout.rows.pair_index]
    # Slots that are not filled hold what nobody reads; a receiver sends zeros back for rows without one.
    filled = layout.slot_expert < layout.local
    probs = torch.where(filled, row.read_probs(payload), 0.0)
    row.write(payload, probs, None)
    payload[~asked] = 0.0
    dx, dp = pack.unload_grad(payload)
    assert dx is not None and dp is not None
    return [payload, dx, dp]


def blocks_of_a_fixed_size_are_one_launch(device: str) -> None:
    """All indices, what is told, and the map without experts of closed groups: no operator of torch."""
    if device != "cpu":
        return  # launches are counted in the interpreter
    import fluid_npu.device as seam
    from fluid_npu.device.kernels.cuda_kernels import CudaKernels
    from fluid_npu.ops.once_bounded import bounded_groups
    from tests.support.op_count import OpCount

    map_TE, told = map_of(50, 8, 3, seed=0), torch.empty(3, 5, dtype=torch.int32)
    kept, seam._kernels[device] = seam._kernels.get(device), CudaKernels()
    try:
        for room_G in ([45, 40, 44, 50], [45, None, 44, None], [50] * 4):
            for _ in range(2):  # the first time the kernel is checked, and constants are made
                with OpCount().with_kernels() as counted:
                    bounded_groups(map_TE, 3, room_G, told[1])
            assert counted.kernels == {"_bounded_rows": 1}, (room_G, counted.kernels)
            assert sum(counted.ops.values()) == 0, (room_G, counted.ops)
    finally:
        seam._kernels.pop(device, None) if kept is None else seam._kernels.update({device: kept})


BOUNDED_CASES: dict[str, Callable[[str], None]] = {
    function.__name__: function
    for function in (rows_in_blocks_of_a_fixed_size_are_those_of_plain_torch, blocks_of_a_fixed_size_are_one_launch)
}
