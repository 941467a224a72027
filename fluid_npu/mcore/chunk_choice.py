"""In how many chunks a layer is pipelined, and whether they are of local experts or of tokens. L local experts.

A function of the configuration, which is equal on all ranks.
"""

from __future__ import annotations

from fluid_npu.device.choice import Choice
from fluid_npu.mcore.chunk_cuts import AXES
from fluid_npu.mcore.dispatch_choice import extra_rows_of_chunks

#: What ``chunks`` and ``chunks_of`` may be besides a number and an axis.
AUTO = "auto"
#: Chunks of experts may have so many times the rows of one piece in 'auto': more costs more than weights read twice.
MOST_EXTRA_ROWS = 1.1


def check_chunks(chunks: int | str, overlap: str) -> int | str:
    """The value itself. Raises ValueError for what is no number of chunks, or asks for a pipeline without 'full'."""
    if chunks == AUTO:
        return chunks
    if isinstance(chunks, bool) or not isinstance(chunks, int) or chunks < 1:
        raise ValueError(f"chunks={chunks!r}: a number of at least 1, or {AUTO!r}")
    if chunks > 1 and overlap != "full":
        raise ValueError(f"chunks={chunks}: overlap={overlap!r} has one; use overlap='full', or leave chunks out")
    return chunks


def check_chunks_of(chunks_of: str, overlap: str, dispatch: str) -> str:
    """The word itself. Raises ValueError for another one, without a pipeline, or for tokens that go plain."""
    if chunks_of not in (AUTO, *AXES):
        raise ValueError(f"chunks_of={chunks_of!r}: allowed are {', '.join(map(repr, (AUTO, *AXES)))}")
    if chunks_of != AUTO and overlap != "full":
        raise ValueError(f"chunks_of={chunks_of!r}: overlap={overlap!r} has no chunks; use overlap='full'")
    if chunks_of == "tokens" and dispatch == "plain":
        raise ValueError(
            "chunks_of='tokens': dispatch='plain' has chunks of experts, which send the same rows and read no weight "
            "twice; use chunks_of='experts' or dispatch='once-per-rank'"
        )
    return chunks_of


def choose_chunks_of(chunks_of: str, chunks: int, form: str, experts: int, topk: int, ranks: int) -> Choice[str]:
    """'tokens' or 'experts', and why.

    Args:
        chunks_of: one of them, or 'auto'.
        chunks: their number.
        form: of the dispatch.
        experts: E.
        topk: K.
        ranks: P.

    Raises:
        ValueError: experts in a number of chunks that does not divide L.
    """
    local = experts // ranks
    if form != "once-per-rank":
        return Choice("experts", f"dispatch={form!r} has rows for each expert, and no weight is read twice")
    if chunks_of == "experts" and local % chunks:
        raise ValueError(
            f"chunks_of='experts': a rank has {local} experts, so chunks={chunks} cannot be; allowed are "
            f"{_words(divisors(local))}, or use chunks_of='tokens'"
        )
    if chunks_of != AUTO:
        return Choice(chunks_of, "as asked")
    if local % chunks:
        return Choice("tokens", f"the {local} experts of a rank make no {chunks} chunks of equally many")
    extra = extra_rows_of_chunks(experts, topk, ranks, chunks)
    said = f"{experts} experts, top-{topk}, {ranks} ranks: {extra:.2f} times the rows in {chunks} chunks of experts"
    if extra <= MOST_EXTRA_ROWS:
        return Choice("experts", f"{said}, at most {MOST_EXTRA_ROWS}, and each weight is read once")
    return Choice("tokens", f"{said}, more than {MOST_EXTRA_ROWS}")


def divisors(local_experts: int) -> list[int]:
    """Numbers of chunks that hold equally many local experts."""
    return [n for n in range(1, local_experts + 1) if local_experts % n == 0]


def choose_chunks(
    chunks: int | str, overlap: str, local_experts: int, obstacle: str | None, of_tokens: bool = False
) -> Choice[int]:
    """The number of chunks, and why.

    Args:
        chunks: a number, or 'auto'.
        overlap: as ``BackwardScheduler``; 'full' alone has chunks.
        local_experts: L.
        obstacle: what keeps this layer in one piece, with the fix; None for nothing.
        of_tokens: chunks may be ranges of tokens, of which there may be any number.

    Raises:
        ValueError: a number that does not divide L where chunks are of experts, or above 1 where there is an obstacle.
    """
    check_chunks(chunks, overlap)
    if overlap != "full":
        return Choice(1, f"overlap={overlap!r}")
    allowed = divisors(local_experts)
    if chunks == AUTO:
        if obstacle is not None:
            return Choice(1, obstacle)
        if of_tokens:
            return Choice(2, "the fewest that overlap")
        if local_experts == 1:
            return Choice(1, "a rank has one expert, which is not split")
        return Choice(allowed[1], f"the fewest that overlap; {local_experts} local experts allow {_words(allowed)}")
    if chunks not in allowed and not of_tokens:
        raise ValueError(
            f"chunks={chunks}: a rank has {local_experts} experts, so allowed are {_words(allowed)} and {AUTO!r}"
        )
    if obstacle is not None and chunks != 1:
        raise ValueError(f"chunks={chunks}: {obstacle}; use chunks=1 or {AUTO!r}")
    return Choice(int(chunks), "as asked")


def check_local_first(local_first: bool, overlap: str) -> bool:
    """The value itself. Raises ValueError for what is no bool, or asks for it without a pipeline."""
    if not isinstance(local_first, bool):
        raise ValueError(f"local_first={local_first!r}: allowed are True and False")
    if local_first and overlap != "full":
        raise ValueError(f"local_first=True: overlap={overlap!r} has no chunks; use overlap='full', or leave it out")
    return local_first


def choose_local_first(asked: bool, ranks: int, obstacle: str | None) -> Choice[bool]:
    """Whether rows that stay on their rank are a chunk before all others, and why.

    ``ranks``: P; ``obstacle`` as ``choose_chunks``, which raises ValueError here too where it was asked for.
    """
    if not asked:
        return Choice(False, "not asked for")
    if obstacle is not None:
        raise ValueError(f"local_first=True: {obstacle}; or use local_first=False")
    if ranks == 1:
        return Choice(False, "one rank has all experts: no row leaves it")
    return Choice(True, "as asked")


def _words(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))
