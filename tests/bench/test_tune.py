"""``fluid-npu tune`` checks before it times, and chooses only what is told from plain."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fluid_npu.bench.agreement import Disagreement
from fluid_npu.bench.tune import CANDIDATES, choose, measure, with_transport
from fluid_npu.cli import main
from fluid_npu.train.config import TrainConfig
from fluid_npu.train.profile import Profile, key_of
from tests.support.fake_graph import FakeRecorder
from tests.support.training import CUT, store

_PLACE: list[Any] = []  # of this process; joined once
PLAIN, DISPATCH, BOTH, *_, LAST = (settings for _, settings in CANDIDATES)
(RECORDED, RECORDED_SETTINGS), *OTHERS_RECORDED = (one for one in CANDIDATES if one[1]["moe_cuda_graph"])
(AHEAD,) = (name for name, one in CANDIDATES if one["a2a_transport"] != "collective" and not one["moe_cuda_graph"])
NOT_HERE = "--a2a-transport high-priority: streams of high priority are NCCL's here, and this device is cpu; use "
NOT_HERE += "--a2a-transport collective or auto"


def row(number: int, ms: float, low: float, *, judged: bool = True, refused: str | None = None) -> dict[str, Any]:
    name, settings = CANDIDATES[number]
    ratio = {"ratio_plain_over_this": low + 0.1, "ratio_plain_over_this_low": low, "ratio_plain_over_this_high": 2.0}
    return {"setting": name, "settings": settings, "median_ms": ms, "judged": judged, "refused": refused, **ratio}


def test_the_fastest_of_those_that_are_told_from_plain_wins() -> None:
    settings, reason = choose([row(0, 10.0, 1.0), row(1, 8.0, 1.1), row(2, 7.0, 1.2)])
    assert settings == BOTH and "7.00 ms, 1.300 times plain's speed" in reason
    assert choose([row(0, 10.0, 1.0), row(1, 8.0, 1.1), row(2, 7.0, 0.9)])[0] == DISPATCH


def test_plain_wins_where_nothing_is_told_from_it() -> None:
    settings, reason = choose([row(0, 10.0, 1.0), row(1, 9.0, 0.99), row(2, 9.5, 0.9)])
    assert settings == PLAIN and "plain is best; dW beside the dispatch's backward: 9.00 ms" in reason
    settings, reason = choose([row(0, 10.0, 1.0), row(1, 5.0, 1.5, judged=False), row(2, 9.5, 0.9)])
    assert settings == PLAIN and reason.startswith("too noisy to judge")


def test_what_was_refused_is_never_chosen() -> None:
    settings, reason = choose([row(0, 10.0, 1.0), row(1, 9.0, 0.9), row(2, 1.0, 9.0, refused="differs in fc1")])
    assert settings == PLAIN and "differs in fc1" in reason
    with pytest.raises(Disagreement, match="plain: wrong"):
        choose([row(0, 10.0, 1.0, refused="wrong"), row(1, 9.0, 1.1), row(2, 9.0, 1.1)])


def tuned(plant: float, **changes: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The result on this rank, and the key of the place."""
    from fluid_npu.train.parallel import join

    config = TrainConfig(**{"preset": "h64", "cut": CUT, "overlap": "dw", "device": "cpu", **changes})
    if not _PLACE:
        _PLACE.append(join(config, store()))
    place = _PLACE[0]
    options = {"rounds": 2, "command": "fluid-npu tune", "link": None, "plant_error": plant}
    return measure(config, options, place), key_of(config, place, hosts=1)


def test_every_setting_is_checked_and_a_wrong_one_is_not_timed(run_ranks: Callable[..., list[Any]]) -> None:
    (right, key), (other, _) = run_ranks(2, tuned, 0.0)
    assert right["profile"] == other["profile"] and right["profile"]["key"] == key
    assert [one["setting"] for one in right["rows"]] == [name for name, _ in CANDIDATES]
    refused = {one["setting"]: one["refused"] for one in right["rows"] if one["refused"]}
    assert refused == {
        "2 chunks of attention heads, dW beside both": "with --cp 1 no heads are exchanged",
        RECORDED: "only CUDA graphs are supported, and the layer is on cpu; leave cuda_graph out",
        **{name: NOT_HERE for name, _ in OTHERS_RECORDED},
        AHEAD: NOT_HERE,
    }
    rows = [one for one in right["rows"] if not one["refused"]]
    assert all(one["error"] <= 1e-5 and one["median_ms"] > 0 and one["peak_memory_mb"] > 0 for one in rows)
    wrong = run_ranks(2, tuned, 0.01)[0][0]
    assert "allowed 1e-05; a wrong result is not timed" in wrong["rows"][-1]["refused"]
    assert "median_ms" not in wrong["rows"][-1] and "median_ms" in wrong["rows"][0]
    assert wrong["profile"]["settings"] != LAST


def test_context_parallelism_is_tuned_with_chunks_of_heads(run_ranks: Callable[..., list[Any]]) -> None:
    """Stock Megatron has none: gradients are compared with plain's, and each setting's bits with its twin's."""
    first, second = (found for found, _ in run_ranks(2, of_heads))
    assert first["profile"] == second["profile"] and first["compared_with"] == "plain"
    plain, heads = first["rows"]
    assert plain["error"] <= 1e-6 and heads["error"] <= 1e-5 and heads["settings"]["attention_chunks"] == 2
    assert plain["median_ms"] > 0 and heads["median_ms"] > 0


def of_heads() -> tuple[dict[str, Any], dict[str, Any]]:
    """Plain and two chunks of attention heads, of two ranks that share each sequence."""
    from fluid_npu.bench import tune

    tune.CANDIDATES = tuple(
        one for number, one in enumerate(CANDIDATES) if not number or one[1]["attention_chunks"] > 1
    )
    return tuned(0.0, cp=2, cut={**CUT, "layers": 2})


class Wrong(FakeRecorder):
    """Replays that are a little off."""

    def record(self, body: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        replay, made = super().record(body)

        def off() -> None:
            replay()
            for tensor in made if isinstance(made, tuple) else (made,):
                if tensor is not None:
                    tensor.mul_(1.01)

        return off, made


class Refuses(FakeRecorder):
    def record(self, body: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        raise RuntimeError("planted")


def of_recordings(recorder: type[FakeRecorder], capacity_mb: float) -> tuple[dict[str, Any], list[int]]:
    """Plain and recorded, on a device of so much memory: the result, and the replays of each layer's two bodies."""
    from fluid_npu.bench import tune, tune_recorded
    from fluid_npu.device.choice import Choice
    from fluid_npu.mcore import graph_choice

    recorders: list[FakeRecorder] = []

    def make() -> FakeRecorder:
        recorders.append(recorder())
        return recorders[-1]

    graph_choice.graph_recorder = lambda device: Choice(make, "a fake")
    tune_recorded.capacity_mb = lambda device: capacity_mb
    tune.CANDIDATES = (CANDIDATES[0], (RECORDED, RECORDED_SETTINGS))
    result, _ = tuned(0.0, cut={**CUT, "layers": 2})
    return result, [count for one in recorders for count in one.replays]


def test_a_replay_is_what_is_checked_and_timed_and_its_memory_counts(run_ranks: Callable[..., list[Any]]) -> None:
    for result, replays in run_ranks(2, of_recordings, FakeRecorder, 1e9):
        plain, recorded = result["rows"]
        assert recorded["error"] <= 1e-5 and recorded["median_ms"] > 0 and "recordings_mb" not in plain
        assert 0 < recorded["recordings_mb"] < recorded["peak_memory_mb"]
        # The first is that of the recording; the check, two rounds, their warm-up and the calls that measure memory.
        assert len(replays) == 4 and min(replays) == max(replays) >= 1 + 1 + 2 + 1, "two layers, there and back"


@pytest.mark.parametrize(
    ("recorder", "capacity_mb", "said"),
    [
        (Wrong, 1e9, "recorded, dW beside the dispatch's backward differs from stock SequentialMLP: relative error"),
        (Refuses, 1e9, "layer 1, layer 2 could not be recorded; the reason is said above"),
        (FakeRecorder, 0.01, "MoE layers of h64 would keep"),
    ],
    ids=["wrong", "not recorded", "no memory"],
)
def test_a_recording_that_is_wrong_or_cannot_be_had_is_refused(
    recorder: type[FakeRecorder], capacity_mb: float, said: str, run_ranks: Callable[..., list[Any]]
) -> None:
    for result, _ in run_ranks(2, of_recordings, recorder, capacity_mb):
        assert said in result["rows"][1]["refused"], result["rows"][1]
        assert result["profile"]["settings"] == PLAIN


def by_pairwise() -> dict[str, Any]:
    """What was tuned where a transport is asked for, by name."""
    from fluid_npu.bench import tune

    tune.CANDIDATES = tuple(one for number, one in enumerate(CANDIDATES) if not number or one[0] == AHEAD)
    result, _ = tuned(0.0, a2a_transport="pairwise")
    return {one["setting"]: (one["settings"]["a2a_transport"], one["refused"]) for one in result["rows"]}


def test_ctas_that_are_asked_for_go_with_their_transport() -> None:
    config = TrainConfig(a2a_transport="high-priority", a2a_ctas=8)
    made = {name: with_transport(settings, config) for name, settings in CANDIDATES}
    assert {(one["a2a_transport"], one["a2a_ctas"]) for one in made.values()} == {("high-priority", 8)}
    other = dict(CANDIDATES)[AHEAD]
    assert with_transport(other, TrainConfig(a2a_transport="few-ctas", a2a_ctas=4)) == other


def test_a_transport_that_is_asked_for_is_everybodys(run_ranks: Callable[..., list[Any]]) -> None:
    wanted = {"plain": ("pairwise", None), AHEAD: ("high-priority", "--a2a-transport pairwise is asked for")}
    assert run_ranks(2, by_pairwise) == [wanted, wanted]


def test_what_recordings_keep_is_part_of_the_reason() -> None:
    fast = {**row(0, 5.0, 1.4), "setting": RECORDED, "settings": RECORDED_SETTINGS, "recordings_mb": 12.34}
    settings, reason = choose([row(0, 10.0, 1.0), fast])
    assert settings["moe_cuda_graph"] and settings["dispatch"] == "static"
    assert reason.endswith("; its recordings keep 12.3 MiB")


def test_the_command_writes_a_profile_that_train_reads(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "profile.json"
    sizes = [word for name, value in CUT.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    assert main(["tune", "--preset", "h64", *sizes, "--rounds", "2", "--device", "cpu", "--out", str(path)]) == 0
    out = capfd.readouterr().out
    assert "Chosen: overlap " in out and f"fluid-npu train --profile {path}" in out
    profile = Profile.read(path)
    assert profile.settings in [settings for _, settings in CANDIDATES] and profile.key["ranks"] == 2
    assert json.loads(path.read_text())["measured"]["rows"][0]["setting"] == "plain"


def test_a_folder_that_is_not_there_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", "--out", "nowhere/profile.json"]) == 2
    assert "--out nowhere/profile.json: the folder nowhere does not exist" in capsys.readouterr().err
