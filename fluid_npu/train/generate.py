"""Write a few words with a trained model.

With expert parallelism every rank takes part in every forward pass, so all ranks must call this together and take
the same token each time: sampling draws from a seeded CPU generator, and `agree` may pass on rank 0's choice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor


class TextTokenizer(Protocol):
    """What generation needs of a tokenizer."""

    eod: int

    @property
    def vocab_size(self) -> int: ...

    def tokenize(self, text: str) -> list[int]: ...

    def detokenize(self, ids: list[int]) -> str: ...


def generate(
    forward_logits: Callable[[Tensor], Tensor],
    tokenizer: TextTokenizer,
    prompt: str,
    max_new_tokens: int = 32,
    temperature: float = 0.8,
    seed: int = 0,
    *,
    max_context: int | None = None,
    agree: Callable[[int], int] | None = None,
) -> str:
    """Continue `prompt` by at most `max_new_tokens`; returns the new text only.

    forward_logits: tokens [1, S] int64 -> logits [1, S, V]; V may be padded beyond the tokenizer's vocabulary.
    temperature 0 takes the likeliest token. `max_context` is the most tokens the model reads: older ones are
    dropped. An end-of-document token ends the text. `agree` maps this rank's token to the one all ranks take.
    Raises ValueError for a negative temperature or count and for logits that are not finite.
    """
    if temperature < 0 or max_new_tokens < 0:
        raise ValueError(f"temperature {temperature} and max_new_tokens {max_new_tokens} must not be negative")
    generator = torch.Generator(device="cpu").manual_seed(seed)
    # A document begins after <eod>.
    ids = [tokenizer.eod, *tokenizer.tokenize(prompt)]
    new: list[int] = []
    with torch.no_grad():
        for _ in range(max_new_tokens):
            window = (ids + new)[-max_context:] if max_context else ids + new
            logits_V = forward_logits(torch.tensor([window], dtype=torch.long))[0, -1, : tokenizer.vocab_size]
            token = sample(logits_V, temperature, generator)
            token = agree(token) if agree is not None else token
            if token == tokenizer.eod:
                break
            new.append(token)
    return tokenizer.detokenize(new)


def sample(logits_V: Tensor, temperature: float, generator: torch.Generator) -> int:
    """One token from logits [V]. The draw uses float64 on the CPU. Raises ValueError when a logit is not finite."""
    logits_V = logits_V.detach().to("cpu", torch.float64)
    if not bool(torch.isfinite(logits_V).all()):
        raise ValueError("the model's logits are not finite (NaN or infinity): its training diverged")
    if temperature == 0:
        return int(logits_V.argmax())
    probs_V = torch.softmax(logits_V / temperature, dim=0)
    return int(torch.multinomial(probs_V, 1, generator=generator))
