"""What is in each chunk, how chunks are put together again, and which kind 'auto' takes."""

from __future__ import annotations

import pytest
import torch

from fluid_npu.device.kernels.groups import DeviceRows
from fluid_npu.mcore.chunk_choice import check_chunks_of, choose_chunks_of
from fluid_npu.mcore.chunk_cuts import Joined, make_cuts, share_experts
from fluid_npu.mcore.dispatch_choice import extra_rows_of_chunks

TOKENS, RANKS, LOCAL = 10, 2, 4


@pytest.mark.parametrize("axis", ["tokens", "experts"])
@pytest.mark.parametrize("local_first", [False, True])
def test_every_choice_of_a_token_is_in_one_chunk(axis: str, local_first: bool) -> None:
    map_TE = torch.rand(TOKENS, RANKS * LOCAL, generator=torch.Generator().manual_seed(1)) < 0.4
    cuts = make_cuts(TOKENS, LOCAL, 2, axis, local_first)
    assert len(cuts) == 2 + local_first and share_experts(cuts) == (axis == "tokens" or local_first)
    for own in range(RANKS):
        found = torch.zeros(TOKENS, RANKS, LOCAL, dtype=torch.int64)
        for cut in cuts:
            mine = cut.map(map_TE, RANKS, own)
            assert mine.is_contiguous() and mine.shape == (cut.num_tokens, RANKS * cut.num_experts)
            found[cut.tokens, :, cut.experts] += mine.view(cut.num_tokens, RANKS, -1)
            for rank in range(RANKS):
                assert cut.sends_to(rank, own) or not mine.view(-1, RANKS, cut.num_experts)[:, rank].any()
        assert torch.equal(found.view(TOKENS, -1), map_TE.long())


@pytest.mark.parametrize("axis", ["tokens", "experts"])
@pytest.mark.parametrize("local_first", [False, True])
@pytest.mark.parametrize("chunks", [1, 2])
def test_what_chunks_give_is_put_where_it_was_cut_from(axis: str, local_first: bool, chunks: int) -> None:
    probs_TE, x_TH = torch.rand(TOKENS, RANKS * LOCAL), torch.rand(TOKENS, 3)
    cuts = make_cuts(TOKENS, LOCAL, chunks, axis, local_first)
    probs, tokens = Joined(cuts, RANKS), Joined(cuts)
    for cut in cuts:
        probs.add(torch.zeros_like(probs_TE) if cut.here else cut.columns(probs_TE).clone())
        tokens.add(x_TH[cut.tokens].clone())
    assert torch.equal(probs.whole, probs_TE)
    times = local_first + (chunks if axis == "experts" else 1)
    torch.testing.assert_close(tokens.whole, x_TH * times)


def test_rows_of_some_groups_are_known_among_all_of_them() -> None:
    rows = DeviceRows(2, capacity=9, expected=6)
    among = rows.among(1, 4)
    assert among.capacity == 9 and among.expected == 6 and len(among) == 4 and rows.among(0, 2) is rows
    rows.settle(torch.tensor([3, 8], dtype=torch.int32))
    assert among.ends(torch.device("cpu"), torch.int32).tolist() == [0, 3, 8, 8]
    assert list(among.on_host()) == [0, 3, 5, 0]


def test_auto_takes_experts_where_that_sends_hardly_more_rows() -> None:
    """The share of a token's rows that is sent again, against a count over all choices of two of eight experts."""
    pairs = [(a, b) for a in range(8) for b in range(a)]
    whole, halves = (sum(len({a // size, b // size}) for a, b in pairs) for size in (2, 1))
    assert extra_rows_of_chunks(8, 2, 4, 2) == pytest.approx(halves / whole)
    once = "once-per-rank"
    value, reason = choose_chunks_of("auto", 2, once, 8, 2, 4)
    assert value == "experts" and "4 ranks: 1.08 times the rows in 2 chunks of experts, at most 1.1" in reason
    assert choose_chunks_of("auto", 2, once, 64, 6, 4).value == "tokens"
    value, reason = choose_chunks_of("auto", 3, once, 8, 2, 2)
    assert value == "tokens" and reason == "the 4 experts of a rank make no 3 chunks of equally many"
    assert tuple(choose_chunks_of("tokens", 2, once, 8, 2, 4)) == ("tokens", "as asked")
    assert choose_chunks_of("auto", 2, "plain", 8, 2, 4).value == "experts"
    with pytest.raises(ValueError, match="chunks_of='experts': a rank has 4 experts, so chunks=3 cannot be"):
        choose_chunks_of("experts", 3, once, 8, 2, 2)


@pytest.mark.parametrize(
    ("chunks_of", "overlap", "dispatch", "said"),
    [
        ("rows", "full", "once-per-rank", "chunks_of='rows': allowed are 'auto', 'tokens', 'experts'"),
        ("experts", "dw", "once-per-rank", "chunks_of='experts': overlap='dw' has no chunks; use overlap='full'"),
        ("tokens", "full", "plain", "chunks_of='tokens': dispatch='plain' has chunks of experts"),
    ],
)
def test_what_cannot_be_is_refused(chunks_of: str, overlap: str, dispatch: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        check_chunks_of(chunks_of, overlap, dispatch)
