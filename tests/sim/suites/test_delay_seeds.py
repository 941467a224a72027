"""The same bits under every order that random delays of the streams' tasks bring about, on 2 and on 4 ranks.

A seed delays half of all tasks (kernels, copies, collectives, event records and waits) of every stream of every rank,
so each seed is another interleaving of streams and ranks. The model is small and has all that may run late: dispatch
and combine in flight, dW beside them and carried over to the layer below, gradients reduced while backward goes on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.support.gpt import Run, train

Ranks = Callable[..., list[Any]]
SIZES = {"expert_model_parallel_size": 2}
LATE = {"overlap_grad_reduce": True, "delay_wgrad_compute": True, "bucket_size": 2000}
SMALL = {"hidden_size": 16, "ffn_hidden_size": 24, "moe_ffn_hidden_size": 24, "num_moe_experts": 4}
RUN = Run(steps=20, config=SMALL, ddp=LATE, spec={"carry_over": True})


def bits(run: Run) -> tuple[list[float], str]:
    """Losses of all steps and a digest of all weights at the end, on this rank."""
    result = train(run)
    digest = hashlib.sha256()
    for name, value in sorted(result["weights"].items()):
        digest.update(name.encode() + value.detach().float().cpu().numpy().tobytes())
    return result["losses"], digest.hexdigest()


def bits_without_waits(run: Run) -> tuple[list[float], str]:
    """The same when nobody waits for an AllToAll: what the delays must bring to light."""
    from fluid_npu.comm.transports import CollectiveTransport

    class Never:
        def __init__(self, work: Any) -> None:
            self.work = work

        def wait(self) -> None: ...

    start = CollectiveTransport.start
    CollectiveTransport.start = lambda *args: Never(start(*args))  # type: ignore[method-assign]
    found = bits(run)
    torch.npu.synchronize()
    return found


def results(run_ranks: Ranks, nproc: int, run: Run, seeds: Sequence[int | None]) -> dict[int | None, Any]:
    """By seed; None is without delays."""
    found = {}
    for seed in seeds:
        env = {} if seed is None else {"FLUID_SIM_DELAY_SEED": str(seed)}
        found[seed] = run_ranks(nproc, bits, run, sizes=SIZES, env=env, timeout=600)
        print(f"{nproc} ranks, {run.steps} steps, seed {seed}: last loss {found[seed][0][0][-1]!r}", flush=True)
    return found


@pytest.mark.parametrize("nproc", [2, 4])
def test_two_seeds_give_the_bits_of_no_delay(nproc: int, run_ranks: Ranks) -> None:
    found = results(run_ranks, nproc, RUN, [None, 1, 2])
    assert found[1] == found[None] and found[2] == found[None]
    losses = found[None][0][0]
    assert len(losses) == 20 and len(set(losses)) == 20


def test_a_wait_that_is_left_out_changes_the_bits(run_ranks: Ranks) -> None:
    run = replace(RUN, steps=2)
    right = run_ranks(2, bits, run, sizes=SIZES)
    wrong = run_ranks(2, bits_without_waits, run, sizes=SIZES, env={"FLUID_SIM_DELAY_SEED": "1"})
    assert wrong != right


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("nproc", [2, 4])
def test_twenty_seeds_of_200_steps_give_the_bits_of_no_delay(nproc: int, run_ranks: Ranks) -> None:
    found = results(run_ranks, nproc, replace(RUN, steps=200), [None, *range(1, 21)])
    different = [seed for seed, result in found.items() if result != found[None]]
    assert not different
    print(f"{nproc} ranks: {len(found) - 1} seeds x 200 steps, all bits as without delays")
