"""One transport for all ranks: never one that a rank lacks or that gives wrong bytes, and by the figures of rank 0."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from fluid_npu.comm.transports import CollectiveTransport, choose, shared_files
from fluid_npu.comm.transports.calibration import Calibration, Cost
from fluid_npu.comm.transports.choose import TransportUnavailable, choose_transport
from fluid_npu.comm.transports.peer_copy import PeerExchange
from fluid_npu.device import get_device
from tests.support.ranks import run_ranks

_CPU = get_device("cpu").value


def _ask(wanted: str, **more: Any) -> tuple[str, str, str]:
    """(transport, reason or error, what was printed)."""
    printed = io.StringIO()
    with redirect_stdout(printed):
        try:
            choice = choose_transport(wanted, [dist.group.WORLD], _CPU, **more)
        except (TransportUnavailable, ValueError) as error:
            return type(error).__name__, str(error), ""
    choose.close(choice.value)
    return choice.value.name, choice.reason, printed.getvalue()


def _everything(folder: str) -> dict[str, tuple[str, str, str]]:
    """All cases of one job, so that processes start once."""
    rank = dist.get_rank()
    found = {name: _ask(name) for name in ("collective", "pairwise", "peer-copy", "few-ctas", "high-priority")}
    found["unknown"] = _ask("carrier-pigeon")
    if rank == 1:
        shared_files._FOLDER, kept = "/nonexistent", shared_files._FOLDER
    found["no memory on rank 1"] = _ask("peer-copy")
    if rank == 1:
        shared_files._FOLDER = kept
    take = PeerExchange._take
    if rank == 1:  # frees a slot that it has not read

        def wrong(exchange: Any, peer: int, piece: Any) -> None:
            memory = exchange._memory
            memory.take, kept = (lambda *ignored: None), memory.take
            take(exchange, peer, piece)
            memory.take = kept

        PeerExchange._take = wrong  # type: ignore[method-assign]
    found["wrong data on rank 1"] = _ask("peer-copy")
    PeerExchange._take = take  # type: ignore[method-assign]
    found["measured"] = _ask("auto", calibration=Calibration(f"{folder}/measured.json"))
    choose.measure = None  # type: ignore[assignment]
    found["stored"] = _ask("auto", calibration=Calibration(f"{folder}/measured.json"))
    found.update(_stored(folder))
    return found


def _stored(folder: str) -> dict[str, tuple[str, str, str]]:
    """Tables that differ between the ranks: rank 0's counts. The file's own key is taken over."""
    key = next(iter(json.loads(Path(f"{folder}/measured.json").read_text())))
    slow, fast = Cost(alone_ms=9.0, exposed_ms=9.0), Cost(alone_ms=1.0, exposed_ms=0.5)
    mine = Calibration(f"{folder}/of{dist.get_rank()}.json")
    best = "peer-copy" if dist.get_rank() == 0 else "pairwise"
    costs = {name: {1 << 20: fast if name == best else slow} for name in ("collective", "peer-copy", "pairwise")}
    costs = {name: {**sizes, 1 << 30: slow} for name, sizes in costs.items()}
    mine.keep(key, costs)
    found = {"small messages": _ask("auto", calibration=mine, bytes_to_peers=1 << 20)}
    found["large messages"] = _ask("auto", calibration=mine, bytes_to_peers=1 << 30)
    bad = Path(f"{folder}/bad{dist.get_rank()}.json")
    bad.write_text("{")
    found["bad file"] = _ask("auto", calibration=Calibration(bad))
    return found


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, tuple[str, str, str]]]:
    return run_ranks(2, _everything, str(tmp_path_factory.mktemp("calibration")))


def test_all_ranks_have_the_same_answer_and_reason(answers: list[dict[str, tuple[str, str, str]]]) -> None:
    for case, (name, reason, _) in answers[0].items():
        assert answers[1][case][:2] == (name, reason), case


def test_a_transport_that_is_asked_for_is_taken_or_refused_by_name(
    answers: list[dict[str, tuple[str, str, str]]],
) -> None:
    mine = answers[1]
    assert [mine[name][0] for name in ("collective", "pairwise", "peer-copy")] == [
        "collective",
        "pairwise",
        "peer-copy",
    ]
    assert "shared memory" in mine["peer-copy"][1] and "self-check passed" in mine["peer-copy"][1]
    refused = (
        "--a2a-transport few-ctas: CTAs are NCCL's, and this device is cpu; use --a2a-transport collective or auto"
    )
    assert mine["few-ctas"][:2] == ("TransportUnavailable", refused)
    assert "streams of high priority are NCCL's here, and this device is cpu" in mine["high-priority"][1]
    assert mine["unknown"][0] == "ValueError"
    assert (
        "'carrier-pigeon': allowed are auto, collective, high-priority, peer-copy, few-ctas, aicpu, pairwise"
        in mine["unknown"][1]
    )


def test_what_one_rank_lacks_or_gets_wrong_no_rank_uses(answers: list[dict[str, tuple[str, str, str]]]) -> None:
    for mine in answers:
        assert mine["no memory on rank 1"][0] == "TransportUnavailable"
        assert "/nonexistent" in mine["no memory on rank 1"][1]
        assert mine["wrong data on rank 1"][0] == "TransportUnavailable"
        assert "self-check on rank 1 of the group: wrong data in exchange 0" in mine["wrong data on rank 1"][1]


def test_auto_measures_once_and_prints_its_choice_once(answers: list[dict[str, tuple[str, str, str]]]) -> None:
    name, reason, printed = answers[0]["measured"]
    assert printed == f"AllToAll transport: {name} ({reason})\n"
    assert answers[1]["measured"][2] == ""
    assert "1 MiB to the peers, alone + exposed beside a product: collective" in reason
    assert "few-ctas: CTAs are NCCL's" in reason
    # The second time nothing could be measured any more: the stored figures are the same, and so is the line.
    assert answers[0]["stored"] == (name, reason, "")


def test_auto_goes_by_rank_0s_figures_at_the_size_that_is_asked_for(
    answers: list[dict[str, tuple[str, str, str]]],
) -> None:
    assert answers[1]["small messages"][0] == "peer-copy"
    assert "peer-copy 1 + 0.5 ms" in answers[1]["small messages"][1]
    assert answers[1]["large messages"][0] == CollectiveTransport.name
    assert answers[1]["bad file"][0] == "ValueError" and "bad0.json" in answers[1]["bad file"][1]
