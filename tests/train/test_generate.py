"""Generation: deterministic, bounded, and the same on every rank."""

from __future__ import annotations

import pytest
import torch

from fluid_npu.train.generate import generate, sample

pytestmark = pytest.mark.host


class Letters:
    """Token i is the letter i; token 0 ends a document."""

    eod = 0
    vocab_size = 5

    def tokenize(self, text: str) -> list[int]:
        return ["#abcd".index(letter) for letter in text]

    def detokenize(self, ids: list[int]) -> str:
        return "".join("#abcd"[i] for i in ids)


def cycle(tokens: torch.Tensor) -> torch.Tensor:
    """A model sure that d follows c follows b follows a; padded to 8 outputs, the padding most likely."""
    logits = torch.zeros(1, tokens.shape[1], 8)
    following = tokens % 4 + 1
    logits.scatter_(2, following.unsqueeze(-1), 50.0)
    logits[..., 5:] = 100.0
    return logits


def flat(tokens: torch.Tensor) -> torch.Tensor:
    return torch.zeros(1, tokens.shape[1], 5)


def test_likeliest_tokens_follow_and_padded_outputs_are_never_taken() -> None:
    assert generate(cycle, Letters(), "ab", max_new_tokens=6, temperature=0) == "cdabcd"
    assert generate(cycle, Letters(), "ab", max_new_tokens=6, temperature=1.0) == "cdabcd"


def test_same_seed_same_text_other_seed_other_text() -> None:
    def write(seed: int) -> str:
        return generate(flat, Letters(), "a", max_new_tokens=50, temperature=1.0, seed=seed)

    assert write(3) == write(3)
    assert len({write(seed) for seed in range(8)}) > 1


def test_global_random_state_is_neither_used_nor_changed() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = generate(flat, Letters(), "a", max_new_tokens=20, temperature=1.0, seed=1)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(99)
    assert generate(flat, Letters(), "a", max_new_tokens=20, temperature=1.0, seed=1) == first


def test_end_of_document_ends_the_text() -> None:
    def ends(tokens: torch.Tensor) -> torch.Tensor:
        logits = cycle(tokens)
        if tokens.shape[1] >= 4:
            logits[0, -1, 0] = 99.0
        return logits

    assert generate(ends, Letters(), "a", max_new_tokens=10, temperature=0) == "bc"


def test_context_is_bounded_and_starts_a_document() -> None:
    seen: list[list[int]] = []

    def watch(tokens: torch.Tensor) -> torch.Tensor:
        seen.append(tokens[0].tolist())
        return cycle(tokens)

    generate(watch, Letters(), "", max_new_tokens=4, temperature=0, max_context=3)
    assert seen == [[0], [0, 1], [0, 1, 2], [1, 2, 3]]


def test_agreed_token_replaces_the_own_choice() -> None:
    assert generate(cycle, Letters(), "a", max_new_tokens=3, temperature=0, agree=lambda token: 4) == "ddd"


def test_no_tokens_asked_for_means_no_forward_pass() -> None:
    assert generate(lambda tokens: pytest.fail("called"), Letters(), "a", max_new_tokens=0) == ""


def test_sampling_follows_the_distribution() -> None:
    generator = torch.Generator().manual_seed(0)
    logits_V = torch.tensor([0.0, 1.0, 2.0])
    drawn = torch.tensor([sample(logits_V, 1.0, generator) for _ in range(4000)])
    share = torch.bincount(drawn, minlength=3) / 4000
    assert torch.allclose(share, torch.softmax(logits_V, 0), atol=0.03)


def test_bad_arguments_and_a_diverged_model_are_refused() -> None:
    with pytest.raises(ValueError, match="temperature -1"):
        generate(flat, Letters(), "a", temperature=-1)
    with pytest.raises(ValueError, match="not finite"):
        generate(lambda tokens: flat(tokens) * float("nan"), Letters(), "a")
