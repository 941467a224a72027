"""Routing workloads W0 to W7: how many rows each rank sends to each expert, exactly, as a function of seed and step.

    W0 balanced        every expert the same
    W1 hot experts     the first expert of each rank gets 4 times what another gets; ranks stay balanced
    W2 hot rank        experts of rank 0 get 3 times what others get
    W3 spread          from 1.5 to 0.5 times the mean, falling with the expert's number
    W4 ragged sources  rank 0 holds T tokens, the last one T/2, falling evenly; destinations are balanced
    W5 zero load       the last rank's experts get nothing
    W6 rotating        as W2, the hot rank is step mod P
    W7 burst           balanced, but in every fourth step experts of one rank, in turn, get 9 times as much

``counts`` is the oracle: whole numbers by integer arithmetic. ``routing_map`` only arranges them, with K different
experts for each token. T tokens of a rank, E experts, L = E/P of a rank, K top-k, P ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_BURST = 4
_TRADES = 12


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """P, E, K and T of rank 0."""

    ranks: int
    experts: int
    topk: int
    tokens: int

    @property
    def local(self) -> int:
        """L."""
        return self.experts // self.ranks


def period(name: str, ranks: int) -> int:
    """Steps after which a workload repeats."""
    return {"W6": ranks, "W7": _BURST * ranks}.get(name, 1)


def tokens_of(name: str, rank: int, sizes: Sizes) -> int:
    """T of a rank."""
    if name != "W4" or sizes.ranks == 1:
        return sizes.tokens
    return sizes.tokens - (sizes.tokens // 2) * rank // (sizes.ranks - 1)


def counts(name: str, step: int, rank: int, sizes: Sizes) -> list[int]:
    """[E] rows that ``rank`` sends to each expert; their sum is T*K. Raises ValueError for sizes that cannot be."""
    tokens = tokens_of(name, rank, sizes)
    return _apportion(_weights(name, step, sizes), tokens * sizes.topk, tokens, first=rank * sizes.local)


def received(name: str, step: int, sizes: Sizes) -> list[int]:
    """[E] rows that each expert gets from all ranks."""
    sent = [counts(name, step, rank, sizes) for rank in range(sizes.ranks)]
    return [sum(column) for column in zip(*sent, strict=True)]


def routing_map(counts_E: Sequence[int], tokens: int, seed: Sequence[int]) -> npt.NDArray[np.bool_]:
    """bool [T, E] with these column sums and as many experts in every row, at random among all such maps.

    Which experts a token has together decides how many rows it is where it goes once to each rank, so that is random
    too: rows trade, in random pairs, the experts that only one of the two has (Strona and others, "A fast and unbiased
    procedure to randomize ecological binary matrices", 2014).
    """
    experts = np.repeat(np.arange(len(counts_E)), counts_E)
    map_TE = np.zeros((tokens, len(counts_E)), dtype=bool)
    # No expert has more than T rows, so its run never meets one token twice.
    map_TE[np.arange(len(experts)) % tokens, experts] = True
    random = np.random.default_rng(seed)
    map_TE = random.permutation(map_TE)
    for _ in range(_TRADES):
        pairs = random.permutation(tokens)[: tokens // 2 * 2].reshape(2, -1)
        one, other = map_TE[pairs[0]], map_TE[pairs[1]]
        apart = one ^ other
        # The experts apart in random order; the first of them go to one row, as many as it had, the rest to the other.
        place = np.where(apart, random.random(apart.shape), 2.0).argsort(1).argsort(1)
        mine = apart & (place < (one & ~other).sum(1, keepdims=True))
        map_TE[pairs[0]], map_TE[pairs[1]] = (one & other) | mine, (one & other) | (apart & ~mine)
    return map_TE


def _weights(name: str, step: int, sizes: Sizes) -> list[int]:
    experts, local = sizes.experts, sizes.local
    rank_of = [expert // local for expert in range(experts)]
    if name == "W1":
        return [4 if expert % local == 0 else 1 for expert in range(experts)]
    if name == "W3":
        return [max(1, 3 * (experts - 1) - 2 * expert) for expert in range(experts)]
    if name == "W5":
        idle = local if experts - local >= sizes.topk else min(experts // 4, experts - sizes.topk)
        return [1] * (experts - idle) + [0] * idle
    hot, times = {
        "W2": (0, 3),
        "W6": (step % sizes.ranks, 3),
        "W7": (step // _BURST % sizes.ranks, 9 if step % _BURST == _BURST - 1 else 1),
    }.get(name, (0, 1))
    return [times if rank == hot else 1 for rank in rank_of]


def _apportion(weights: list[int], rows: int, most: int, first: int) -> list[int]:
    """Whole numbers of sum ``rows`` in these proportions, none above ``most``; what is left over goes round."""
    if most * sum(weight > 0 for weight in weights) < rows:
        raise ValueError(f"{rows} rows do not fit {len(weights)} experts of at most {most}; use a smaller --topk")
    result, open_ones = [0] * len(weights), [e for e, weight in enumerate(weights) if weight]
    while True:
        left = rows - sum(result[e] for e in range(len(weights)) if e not in open_ones)
        total = sum(weights[e] for e in open_ones)
        for e in open_ones:
            result[e] = left * weights[e] // total if total else 0
        over = [e for e in open_ones if result[e] > most]
        if not over:
            break
        for e in over:
            result[e] = most
        open_ones = [e for e in open_ones if e not in over]
    turn = sorted(open_ones, key=lambda e: (e - first) % len(weights))
    while (missing := rows - sum(result)) > 0:
        for e in [e for e in turn if result[e] < most][:missing]:
            result[e] += 1
    return result
