"""A whole MoE layer recorded and replayed: the bits of the layer as ever, over steps with changing routing.

Here with a recorder that calls the layer again; ``tests/device/test_cuda_graph.py`` has the same on GPUs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from tests.support.fake_graph import FakeRecorder
from tests.support.gpt import Run, same_bits, train_all
from tests.support.moe import Case, all_weights, fluid_layer, load, make_config
from tests.support.recorded_layer import Steps, run_steps
from tests.support.refusals import value_errors

Ranks = Callable[..., list[Any]]

CASES = [Steps(), Steps(overlap="off"), Steps(recompute=True, topk=1), Steps(shared=True, fuse=False), Steps(aux=True)]
CASES += [Steps(overlap="full", local_first=True, shared=shared, fuse=not shared) for shared in (False, True)]


#: Sizes that depend on the routing. There is room for every row: 24 tokens with three experts each.
ONCE = [
    Steps(dispatch="once-per-rank", steps=4),
    Steps(dispatch="once-per-rank", steps=4, shared=True, fuse=False, overlap="full", chunks=1, local_first=True),
    Steps(dispatch="once-per-rank", steps=4, aux=True, overlap="full", chunks=2, chunks_of="tokens", local_first=True),
    Steps(dispatch="once-per-rank", steps=4, recompute=True, overlap="full", chunks=2, chunks_of="tokens"),
    Steps(dispatch="once-per-rank", steps=4, overlap="full", chunks=2, chunks_of="experts", local_first=True),
    Steps(dispatch="once-per-rank", steps=4, fuse=False, overlap="full", chunks=2, chunks_of="experts"),
]
#: So few spare rows that some replays lack room.
TIGHT = [replace(case, tokens=200, topk=1, steps=8, rate=1e-3) for case in ONCE]


def both(cases: list[Steps]) -> list[tuple[dict[str, Any], dict[str, Any], list[int]]]:
    """Each case as ever and recorded, with the replays of the recorder."""
    found = []
    for case in cases:
        recorder = FakeRecorder()
        _take(recorder)
        found.append((run_steps(case), run_steps(replace(case, graph=True)), recorder.replays))
    return found


def test_three_steps_of_two_micro_batches_have_the_bits_of_the_layer_as_ever(run_ranks: Ranks) -> None:
    for found in run_ranks(2, both, CASES, sizes={"expert_model_parallel_size": 2}):
        for case, (eager, recorded, replays) in zip(CASES, found, strict=True):
            # Three calls warm up; the other three of the six are replayed, forward and backward.
            assert replays == [3, 3], case
            assert eager["tensors"].keys() == recorded["tensors"].keys()
            for name, wanted in eager["tensors"].items():
                assert torch.equal(recorded["tensors"][name], wanted), (case, name)
            for name in ("a2a_count", "a2a_bytes", "total_dw_tasks", "completed_dw_tasks", "dw_flops"):
                assert recorded["stats"][name] == eager["stats"][name], (case, name)


def test_sizes_that_depend_on_the_routing_are_recorded_with_room(run_ranks: Ranks) -> None:
    for found in run_ranks(2, both, ONCE, sizes={"expert_model_parallel_size": 2}):
        for case, (eager, recorded, replays) in zip(ONCE, found, strict=True):
            # Two calls tell sizes, two more keep to what was agreed on; the other four of the eight are replayed.
            assert replays == [4, 4], case
            for name, wanted in eager["tensors"].items():
                assert torch.equal(recorded["tensors"][name], wanted), (case, name)
            for name in ("a2a_count", "total_dw_tasks", "completed_dw_tasks"):
                assert recorded["stats"][name] == eager["stats"][name], (case, name)


def with_little_room(spare: int) -> list[tuple[list[str], list[int], list[str]]]:
    """Of each case what differs from the layer as ever, the replays, and what is said."""
    from fluid_npu.device import choice
    from fluid_npu.mcore import agreed_room

    agreed_room._with_spare = lambda most, times, of=10**6: max(0, min(most + spare, of))  # type: ignore[attr-defined]
    found = []
    for case in TIGHT:
        choice._announced.clear()
        ((eager, recorded, replays),) = both([case])
        differ = [n for n, wanted in eager["tensors"].items() if not torch.equal(recorded["tensors"][n], wanted)]
        said = [str(one.value) for what, one in choice.announced() if what.startswith("graph of")]
        found.append((differ, replays, said))
    return found


def test_a_replay_without_room_is_computed_as_ever_by_all_ranks(run_ranks: Ranks) -> None:
    """Auxiliary losses too, which its forward has logged already; after three of them it is recorded anew."""
    first, second = run_ranks(2, with_little_room, 2, sizes={"expert_model_parallel_size": 2})
    assert first == second
    for case, (differ, replays, said) in zip(TIGHT, first, strict=True):
        assert differ == [], case
        lacking = sum(replays[::2]) - sum(replays[1::2])
        assert lacking > 0 and "as ever" in said, (case, replays, "every replay had room: nothing is tested")
        assert ("anew" in said) == (len(replays) > 2 or lacking == 3), (case, replays)
    assert any(len(replays) > 2 and replays[3] for _, replays, _ in first), "none was recorded anew and replayed"


def test_calls_before_the_recording_without_room_are_computed_as_ever_too(run_ranks: Ranks) -> None:
    """Nothing fits: every forward that keeps to the room is thrown away, called or replayed."""
    first, second = run_ranks(2, with_little_room, -40, sizes={"expert_model_parallel_size": 2})
    assert first == second
    for case, (differ, replays, said) in zip(TIGHT, first, strict=True):
        assert differ == [] and not any(replays[1::2]), (case, replays)
        assert sum(replays) >= 3 and "anew" in said, (case, replays)


def with_little_room_for_experts() -> list[tuple[list[str], list[int], list[tuple[bool, bool]]]]:
    """Of each case what differs from the layer as ever, the replays, and of each answer: blocks suffice, all does."""
    from fluid_npu.mcore import agreed_room

    room, seen = agreed_room.AgreedRoom, list[tuple[bool, bool]]()
    observe, sufficed = room.observe, room.sufficed

    def with_blocks_for_all(self: Any, sent: Any, tokens: Any, pairs: Any) -> None:
        observe(self, [[of] * len(rows) for of, rows in zip(tokens, sent, strict=True)], tokens, pairs)

    def noted(self: Any) -> bool:
        enough = sufficed(self)
        if self._told:
            seen.append((not self._answer[:, 0].any(), enough))
        return enough

    agreed_room._with_spare = lambda most, times, of=10**6: min(most + 2, of)  # type: ignore[attr-defined]
    room.observe, room.sufficed = with_blocks_for_all, noted  # type: ignore[method-assign]
    found = []
    for case in TIGHT:
        seen.clear()
        ((eager, recorded, replays),) = both([replace(case, topk=2)])
        differ = [n for n, wanted in eager["tensors"].items() if not torch.equal(recorded["tensors"][n], wanted)]
        found.append((differ, replays, list(seen)))
    return found


def test_a_replay_whose_experts_lack_room_is_computed_as_ever_by_all_ranks(run_ranks: Ranks) -> None:
    """All blocks have room for every token, so that only the experts' buffers may have too little."""
    first, second = run_ranks(2, with_little_room_for_experts, sizes={"expert_model_parallel_size": 2})
    assert first == second
    for case, (differ, replays, answers) in zip(TIGHT, first, strict=True):
        assert differ == [] and answers, case
        assert all(blocks for blocks, _ in answers), (case, "a block lacked room")
        lacking = sum(replays[::2]) - sum(replays[1::2])
        assert lacking > 0 and (True, False) in answers, (case, replays, "every replay had room: nothing is tested")


def logged_losses() -> tuple[list[float], list[float], int]:
    """Megatron's log of an auxiliary loss over steps some of whose replays lack room, as ever and recorded."""
    from megatron.core.transformer.moe import moe_utils

    from fluid_npu.mcore import agreed_room

    def values() -> list[torch.Tensor]:
        return [entry["values"] for entry in moe_utils.get_moe_layer_wise_logging_tracker().values()]

    class Quiet(FakeRecorder):
        def record(self, body: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
            before = [log.clone() for log in values()]
            made = super().record(body)  # which logs, as a recording of CUDA would not
            for log, old in zip(values(), before, strict=True):
                log.copy_(old)
            return made

    agreed_room._with_spare = lambda most, times, of=10**6: min(most + 2, of)  # type: ignore[attr-defined]
    logs: list[list[float]] = []
    replays: list[int] = []
    for graph in (False, True):
        moe_utils.get_moe_layer_wise_logging_tracker().clear()
        recorder = Quiet()
        _take(recorder)
        run_steps(replace(TIGHT[2], graph=graph))
        logs.append([float(log.sum()) for log in values()])
        replays = recorder.replays
    return logs[0], logs[1], sum(replays[::2]) - sum(replays[1::2])


def _take(recorder: FakeRecorder) -> None:
    from fluid_npu.device.choice import Choice
    from fluid_npu.mcore import graph_choice

    graph_choice.graph_recorder = lambda device: Choice(lambda: recorder, "a fake")


def test_a_replay_without_room_logs_nothing_twice(run_ranks: Ranks) -> None:
    for wanted, found, lacking in run_ranks(2, logged_losses, sizes={"expert_model_parallel_size": 2}):
        assert lacking > 0 and wanted and found == wanted


def in_a_model(overlap_grad_reduce: bool) -> tuple[list[list[str]], list[float], list[float], int]:
    """A GPT model under Megatron's DDP, as ever and recorded: what differs, the losses, and the replays."""
    from fluid_npu.device.choice import Choice
    from fluid_npu.mcore import graph_choice
    from fluid_npu.schedule.graphed import GraphedLayer

    recorders: list[FakeRecorder] = []

    def make() -> FakeRecorder:
        recorders.append(FakeRecorder())
        return recorders[-1]

    graph_choice.graph_recorder = lambda device: Choice(make, "a fake")
    GraphedLayer._in_the_way = lambda self: ""  # type: ignore[method-assign]  # the test's training records its tasks
    run = Run(micro_batches=2, ddp={"overlap_grad_reduce": overlap_grad_reduce}, spec={"dispatch": "static"})
    eager, recorded = train_all([run, replace(run, spec={"dispatch": "static", "cuda_graph": True})])
    differ = [same_bits(eager[name], recorded[name]) for name in ("grads", "weights")]
    return differ, eager["losses"], recorded["losses"], sum(sum(recorder.replays) for recorder in recorders)


def test_a_model_under_ddp_trains_alike(run_ranks: Ranks) -> None:
    """Gradients reach DDP's buffers and its hooks count every parameter, reduced at once or at the end."""
    for overlap in (True, False):
        for differ, eager, recorded, replays in run_ranks(
            2, in_a_model, overlap, sizes={"expert_model_parallel_size": 2}
        ):
            assert differ == [[], []] and eager == recorded
            assert replays == 2 * 2 * 3, "two layers, forward and backward, three of six micro-batches"


def one_without_memory() -> tuple[list[str], list[int], list[str]]:
    """Recording fails on rank 1: what differs from the layer as ever, this rank's replays, and what is said."""
    import torch.distributed as dist

    from fluid_npu.device import choice
    from fluid_npu.device.choice import Choice
    from fluid_npu.mcore import graph_choice

    class Fails(FakeRecorder):
        def record(self, body: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
            made = super().record(body)  # which exchanges, as a recording of CUDA would not
            if len(self.replays) == 2 and dist.get_rank() == 1:
                raise torch.OutOfMemoryError("planted")
            return made

    choice._announced.clear()
    recorder = Fails()
    graph_choice.graph_recorder = lambda device: Choice(lambda: recorder, "a fake")
    eager, recorded = run_steps(Steps()), run_steps(Steps(graph=True))
    differ = [name for name, wanted in eager["tensors"].items() if not torch.equal(recorded["tensors"][name], wanted)]
    assert not recorded["recorded"]
    return differ, recorder.replays, [one.reason for what, one in choice.announced() if what.startswith("graph of")]


def test_no_rank_replays_what_another_could_not_record(run_ranks: Ranks) -> None:
    first, second = run_ranks(2, one_without_memory, sizes={"expert_model_parallel_size": 2})
    assert first[0] == second[0] == []
    assert first[1] == second[1] == [0, 0]
    assert first[2] == ["it cannot be recorded (rank 1: OutOfMemoryError: planted)"]
    assert second[2] == ["it cannot be recorded (OutOfMemoryError: planted)"]


def one_that_does_not_come() -> str:
    import torch.distributed as dist

    from fluid_npu.comm.all_to_all import Peers
    from fluid_npu.mcore.recorded_together import RecordedTogether

    together = RecordedTogether(Peers.of(dist.group.WORLD), timeout_s=0.2)
    if dist.get_rank() == 0:
        try:
            together("")
        except RuntimeError as error:
            return str(error)
    return ""


def test_a_rank_that_does_not_come_to_record_is_named(run_ranks: Ranks) -> None:
    message, _ = run_ranks(2, one_that_does_not_come)
    assert "rank 0 recorded a layer, but rank 1 did not come to it in 0 s" in message


def refusals() -> dict[str, str]:
    """What is in the way of a recording."""
    from fluid_npu.comm.transports import PairwiseTransport
    from fluid_npu.mcore.layer_spec import get_fluid_moe_layer_spec
    from tests.support.moe import _built

    def build(case: Case, **spec: Any) -> Any:
        config = make_config(case)
        made = get_fluid_moe_layer_spec(config, cuda_graph=True, **{"dispatch": "static", **spec})
        return _built(made.submodules.mlp, config)

    sinkhorn = {"moe_router_load_balancing_type": "sinkhorn", "moe_aux_loss_coeff": 0.0}
    recompute = {"recompute_granularity": "selective", "recompute_modules": ["moe"]}
    calls: dict[str, Callable[[], Any]] = {
        "cpu": lambda: build(Case()),
        "plain": lambda: build(Case(), dispatch="plain"),
        "carry": lambda: build(Case(), carry_over=True),
        "pairwise": lambda: build(Case(), transport=PairwiseTransport()),
        "sinkhorn": lambda: build(Case(config=sinkhorn)),
        "recompute": lambda: build(Case(config=recompute)),
        "allgather": lambda: build(Case(config={"moe_token_dispatcher_type": "allgather"}), dispatch="plain"),
    }
    return value_errors(calls)


def test_what_is_in_the_way_is_named(run_ranks: Ranks) -> None:
    messages = run_ranks(2, refusals, sizes={"expert_model_parallel_size": 2})[0]
    assert all(message.startswith("cuda_graph=True: ") for message in messages.values()), messages
    assert "the layer is on cpu; leave cuda_graph out" in messages["cpu"]
    assert (
        "with dispatch='plain' (as asked) the host waits for sizes; use dispatch='static' or 'once-per-rank'"
        in messages["plain"]
    )
    assert "carry_over=True leaves dW for another layer" in messages["carry"]
    assert "pairwise counts its exchanges" in messages["pairwise"]
    assert "moe_router_load_balancing_type='sinkhorn'" in messages["sinkhorn"]
    assert "recompute_granularity='selective' of ['moe']" in messages["recompute"]
    assert "moe_token_dispatcher_type='allgather' is Megatron's own" in messages["allgather"]


def by_itself() -> tuple[dict[str, bool], list[str], str]:
    """Which layers 'auto' records where there is a recorder, what it said, and what a wrong word is told."""
    from fluid_npu.device import choice
    from fluid_npu.device.choice import Choice
    from fluid_npu.mcore import graph_choice
    from fluid_npu.mcore.layer_spec import get_fluid_moe_layer_spec
    from tests.support.moe import _built

    choice._announced.clear()
    config, recorded = make_config(Case()), {}
    for name, spec in (("cpu", {}), ("static", {}), ("plain", {"dispatch": "plain"}), ("carry", {"carry_over": True})):
        if name == "static":
            graph_choice.graph_recorder = lambda device: Choice(FakeRecorder, "a fake")
        made = get_fluid_moe_layer_spec(config, cuda_graph="auto", **{"dispatch": "static", **spec})
        recorded[name] = _built(made.submodules.mlp, config).graphed is not None
    said = [f"{one.value}: {one.reason}" for what, one in choice.announced() if what == "recorded MoE layers"]
    wrong = value_errors({"wrong": lambda: get_fluid_moe_layer_spec(config, cuda_graph="always")})["wrong"]
    return recorded, said, wrong


def test_auto_records_where_nothing_is_in_the_way_and_says_what_is(run_ranks: Ranks) -> None:
    first, second = run_ranks(2, by_itself, sizes={"expert_model_parallel_size": 2})
    assert first == second
    recorded, said, wrong = first
    assert recorded == {"cpu": False, "static": True, "plain": False, "carry": False}
    assert said[0] == "False: only CUDA graphs are supported, and the layer is on cpu"
    assert said[1].startswith("True: nothing is in the way")
    assert "the host waits for sizes" in said[2] and "leaves dW for another layer" in said[3] and len(said) == 4
    assert wrong == "cuda_graph='always': allowed are True, False and 'auto'"


def a_layer_without() -> bool:
    """Off by default."""
    layer = fluid_layer(Case(dispatch="static"))
    load(layer, all_weights(Case()), Case(), 0)
    return layer.graphed is None


def test_it_is_off_by_default(run_ranks: Ranks) -> None:
    assert all(run_ranks(2, a_layer_without, sizes={"expert_model_parallel_size": 2}))
