"""Programs with one fault each on an NPU, and the same mended; ``tests/order/test_on_the_simulator.py`` runs this.

python tests/support/order_on_npu.py FOLDER     # FLUID_SIM_ORDER makes the simulator's record, FOLDER gets Python's
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]


def no_wait_before_the_side_stream(npu: Any, good: bool) -> float:
    """One stream multiplies, another one adds to the product."""
    side, current = npu.Stream(), npu.current_stream()
    x = torch.ones(64, 64, device=torch.device(npu.__name__.rpartition(".")[2], 0))
    y = x @ x
    if good:
        side.wait_stream(current)
    with npu.stream(side):
        z = y + 1
    current.wait_stream(side)
    return float(z.sum())


def overwritten_under_the_side_stream(npu: Any, good: bool) -> float:
    """The side stream copies what the current one overwrites."""
    side, current = npu.Stream(), npu.current_stream()
    x = torch.ones(64, 64, device=torch.device(npu.__name__.rpartition(".")[2], 0))
    side.wait_stream(current)
    with npu.stream(side):
        y = x.clone()
    done = side.record_event()
    if good:
        current.wait_event(done)
    x.zero_()
    current.wait_event(done)
    return float(y.sum())


def fused_operator_reads_too_early(npu: Any, good: bool) -> float:
    """An operator of torch_npu's own library on another stream than its input's writer."""
    side, current = npu.Stream(), npu.current_stream()
    x = torch.ones(4, 8).npu()
    x.mul_(2)
    made = current.record_event()
    if good:
        side.wait_event(made)
    with npu.stream(side):
        y = torch.ops.npu.npu_swiglu(x, -1)
    side.synchronize()
    return float(y.sum())


PROGRAMS = (no_wait_before_the_side_stream, overwritten_under_the_side_stream, fused_operator_reads_too_early)


def events_of_the_device() -> None:
    """Changes of the device's events and synchronisation are noticed: times go wrong, or nothing was waited for."""
    sys.path.insert(0, str(ROOT))
    from tests.support.mutation import all_mutants, mutated

    mutants = [None, *(mutant for mutant in all_mutants() if mutant.path == "fluid_npu/device/base.py")]
    for mutant in mutants:
        source = (ROOT / "fluid_npu/device/base.py").read_text(encoding="utf-8")
        space: dict[str, Any] = {"__name__": "changed"}
        sys.modules["changed"] = type(sys)("changed")
        exec(compile(source if mutant is None else mutated(mutant), "changed", "exec"), space)
        print("unchanged" if mutant is None else mutant, "->", "right" if _device_works(space) else "noticed")


def _strict_event(npu: Any) -> Any:
    """An event with CUDA's contract, which AcceleratorEvent is for too: no time before both events have happened.

    torch_npu waits for them by itself.
    """

    class Event(npu.Event):
        def elapsed_time(self, end: Any) -> float:
            if not (self.query() and end.query()):
                raise RuntimeError("both events must be completed before calculating elapsed time")
            return float(super().elapsed_time(end))

    return Event(enable_timing=True)


def _device_works(space: dict[str, Any]) -> bool:
    npu = torch.npu
    device = type("Npu", (space["AcceleratorDevice"],), {"name": "npu", "_module": npu})
    device.event = lambda self: space["AcceleratorEvent"](_strict_event(npu))
    device.__abstractmethods__ = frozenset()
    here = device()
    x = torch.ones(768, 768).npu()
    npu.synchronize()
    try:
        start, end = here.event(), here.event()
        start.record()
        for _ in range(3):
            x @ x
        end.record()
        timed = 0.1 < end.elapsed_ms(start) < 60_000
        for _ in range(3):
            x @ x
        here.synchronize()
        return timed and npu.current_stream().query()
    except RuntimeError:
        return False
    finally:
        npu.synchronize()


def main() -> None:
    """Each program mended, then as it is, with both records."""
    sys.path.insert(0, str(ROOT))
    import torch_npu

    from fluid_npu.order.recorder import OrderRecorder

    torch_npu.npu.set_device(0)
    with OrderRecorder(0) as recorder:
        for program in PROGRAMS:
            program(torch.npu, True)
            torch.npu.synchronize()
        for program in PROGRAMS:
            program(torch.npu, False)
            torch.npu.synchronize()
    recorder.save(sys.argv[1])
    events_of_the_device()


if __name__ == "__main__":
    main()
