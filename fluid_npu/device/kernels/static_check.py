"""Does ``triton_static`` compute here what a loop over slots says, on a few received rows?"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fluid_npu.device.kernels.routed import Slots
from fluid_npu.device.kernels.triton_support import load

_LOCAL, _HIDDEN = 3, 24
#: The experts of each received row, ascending: some have none, the last one neither.
_CHOSEN = ((1,), (), (0, 2), (0, 1), (2,), (0, 2), ())
_CAPACITY = 2 * len(_CHOSEN)
#: Less than the rows that are asked for: some received rows lose one slot of two.
_TOO_FEW = 5

Random = Callable[[int, int, torch.dtype, torch.device], Tensor]


def pairs_of_static(dtype: torch.dtype, device: torch.device, random: Random) -> list[tuple[Tensor, Tensor]]:
    """(what the kernels gave, what it should be) for each tensor, all on the CPU."""
    module, slots = load("triton_static"), Slots(2, 4, torch.float32, _LOCAL)
    rows, ends, pairs = _rows()
    payload = random(len(_CHOSEN), slots.width(_HIDDEN, dtype), dtype, device)
    p_MS = random(len(_CHOSEN), 2, torch.float32, device)
    payload[:, _HIDDEN:] = _tail(p_MS).view(dtype)
    place, found_ends = module.place_rows(payload, slots, _CAPACITY)
    few_places, few_ends = module.place_rows(payload, slots, _TOO_FEW)
    x, p = module.expand_rows(payload, place, _CAPACITY, slots)
    used = len(pairs)
    tokens = torch.tensor([m for m, _ in pairs], device=device)
    inside = torch.tensor([s for _, s in pairs], device=device)
    wanted_x, wanted_p = payload[tokens, :_HIDDEN], p_MS[tokens, inside]
    x[used:], p[used:] = float("nan"), float("nan")  # what nobody wrote must not be read
    back = module.reduce_rows(x, p, place, slots)
    sums = torch.stack([payload[m, :_HIDDEN].float() * len(experts) for m, experts in enumerate(_CHOSEN)]).to(dtype)
    slot_filled = torch.tensor([[s < len(experts) for s in range(2)] for experts in _CHOSEN], device=device)
    got_p = back[:, _HIDDEN:].view(torch.float32)[:, :2]
    results = [
        (place, rows),
        (found_ends, ends),
        (few_places, torch.where(rows < _TOO_FEW, rows, -1)),
        (few_ends, ends.clamp(max=_TOO_FEW)),
        (x[:used], wanted_x),
        (p[:used], wanted_p),
        (back[:, :_HIDDEN].float(), sums.float()),
        (got_p, torch.where(slot_filled, p_MS, 0.0)),
        (module.sum_rows(x, place).float(), sums.float()),
        (module.spread_rows(payload[:, :_HIDDEN], place, _CAPACITY)[:used], wanted_x),
    ]
    return [(got.cpu(), wanted.cpu()) for got, wanted in results]


def _rows() -> tuple[Tensor, Tensor, list[tuple[int, int]]]:
    """The place of each slot, where each expert's rows end, and the (received row, slot) of each row of the experts."""
    pairs = [(m, chosen.index(e)) for e in range(_LOCAL) for m, chosen in enumerate(_CHOSEN) if e in chosen]
    place = torch.full((len(_CHOSEN), 2), -1, dtype=torch.int32)
    for row, (m, slot) in enumerate(pairs):
        place[m, slot] = row
    counts = torch.tensor([sum(e in chosen for chosen in _CHOSEN) for e in range(_LOCAL)])
    return place, counts.cumsum(0).int(), pairs


def _tail(p_MS: Tensor) -> Tensor:
    """[M, 4]: probabilities, then the numbers of the experts, ``_LOCAL`` for an empty slot."""
    numbers = [[*chosen, _LOCAL, _LOCAL][:2] for chosen in _CHOSEN]
    return torch.cat([p_MS, torch.tensor(numbers, dtype=torch.int32, device=p_MS.device).view(torch.float32)], dim=1)
