"""In how many chunks a layer is pipelined: of local experts, or of tokens that are sent once per rank. L local experts.

A function of the configuration, which is equal on all ranks.
"""

from __future__ import annotations

from fluid_npu.device.choice import Choice

#: What ``chunks`` may be besides a number.
AUTO = "auto"


def check_chunks(chunks: int | str, overlap: str) -> int | str:
    """The value itself. Raises ValueError for what is no number of chunks, or asks for a pipeline without 'full'."""
    if chunks == AUTO:
        return chunks
    if isinstance(chunks, bool) or not isinstance(chunks, int) or chunks < 1:
        raise ValueError(f"chunks={chunks!r}: a number of at least 1, or {AUTO!r}")
    if chunks > 1 and overlap != "full":
        raise ValueError(f"chunks={chunks}: overlap={overlap!r} has one; use overlap='full', or leave chunks out")
    return chunks


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
        of_tokens: chunks are ranges of tokens, of which there may be any number.

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
            return Choice(2, "the fewest that overlap; chunks of tokens, because tokens are sent once per rank")
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
