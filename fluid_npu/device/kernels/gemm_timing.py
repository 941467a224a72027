"""Runs the forms of a grouped matmul on real operands: is each result right, and how long does it take.

The reference is a product of each group by itself in cuBLAS or, on a CPU, in BLAS. A dW is added to a scratch buffer,
never to the main_grad of the call. Forms are timed in turns: a GPU at its power limit gets slower over seconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from fluid_npu.device.kernels.gemm_beside import Occupant
from fluid_npu.device.kernels.gemm_forms import FORMS, Form, GemmCall
from fluid_npu.device.kernels.groups import DeviceRows
from fluid_npu.device.kernels.known_rows import known

_TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 2e-2, torch.float16: 5e-3}  # of the largest entry; tf32 may be on
_ROWS = 2048  # compared at a time
_UNTIMED, _TIMED = 2, 9
_AHEAD_CYCLES = 500_000  # a quarter of a millisecond


@dataclass(frozen=True)
class Trial:
    """What a form did: median milliseconds, or why it cannot be used."""

    ms: float | None
    failure: str = ""


def try_forms(
    forms: Mapping[str, Form], call: GemmCall, late: Callable[[], bool], occupant: Occupant | None = None
) -> dict[str, Trial]:
    """Checks each form against one product a group, then times those that are right, one after another in turns.

    No further form is begun once ``late()``; those are missing from the result. Each is timed beside ``occupant``.
    """
    work = replace(call, out=torch.zeros_like(call.out)) if call.out is not None else call
    trials: dict[str, Trial] = {}
    for name, form in forms.items():
        if late():
            break
        trials[name] = Trial(None, _failure(form, work))
    right = {name: partial(forms[name].run, work) for name, trial in trials.items() if not trial.failure}
    return {**trials, **{name: Trial(ms) for name, ms in median_ms(right, call.a, occupant=occupant).items()}}


def _failure(form: Form, call: GemmCall) -> str:
    """Why ``form`` cannot be used for this call; empty if it can."""
    try:
        if call.out is not None:
            call.out.zero_()
        off = _error(form, call)
    except Exception as error:  # a form that does not compile or does not fit into memory is no candidate
        return f"{type(error).__name__}: {str(error)[:200]}"
    return "" if off <= _TOLERANCE.get(call.a.dtype, 1e-6) else f"off by {off:.1e} of the largest entry"


def room_to_measure(call: GemmCall) -> str | None:
    """Why there is not the memory to measure this call, or None."""
    if not call.a.is_cuda:
        return None
    result = 4 * call.multiply_adds // max(call.rows, 1) if call.op.startswith("dw") else 0
    rows = call.a.shape[0] * call.weight_shape[2] * call.a.element_size()
    needed = 2 * result * len(call.counts) if result else 2 * rows
    free = torch.cuda.mem_get_info(call.a.device)[0]
    free += torch.cuda.memory_reserved(call.a.device) - torch.cuda.memory_allocated(call.a.device)
    if needed > 0.8 * free:
        return f"it needs {needed / 2**20:.0f} MiB and {free / 2**20:.0f} are free"
    return None


def _error(form: Form, call: GemmCall) -> float:
    """The largest difference from the loop, as a share of the loop's largest entry."""
    if call.out is None:
        wanted, got = FORMS["loop"].run(call), form.run(call)
        assert wanted is not None and got is not None
        if isinstance(call.counts, DeviceRows) and call.op in ("mm", "mm_t"):
            # Behind the rows in use nothing is written.
            _, (wanted, got) = known(call.counts, wanted, got)
        return _worst(got.flatten(0, -2), wanted.flatten(0, -2)) if got.shape == wanted.shape else float("inf")
    # Added, then taken away again by the form under test: one scratch buffer instead of two.
    FORMS["loop"].run(call)
    size = float(call.out.abs().max())
    form.run(call.negated())
    left = float(call.out.abs().max())
    return left / max(size, 1e-30) if left == left else float("inf")


def _worst(got: Tensor, wanted: Tensor) -> float:
    worst, size = 0.0, 1e-30
    for a, b in zip(got.split(_ROWS), wanted.split(_ROWS), strict=True):
        error = float((a.float() - b.float()).abs().max())
        if error != error:
            return float("inf")
        worst, size = max(worst, error), max(size, float(b.float().abs().max()))
    return worst / size


def median_ms(
    runs: Mapping[str, Callable[[], object]], where: Tensor, ahead: bool = False, occupant: Occupant | None = None
) -> dict[str, float]:
    """Median milliseconds of each run; by events on the device of ``where``.

    All run in turns, each turn beginning with another one, and the host does not wait inside a turn: so a GPU is as
    warm for one as for another, and as in a step. The first turns do not count. With ``ahead`` the host gets a start
    before each run, so that its time to launch does not count; so it does beside an ``occupant``.
    """
    names, times = list(runs), {name: list[float]() for name in runs}
    for turn in range(_UNTIMED + _TIMED):
        first = turn % max(len(names), 1)
        marks = {name: _timed(runs[name], where, ahead, occupant) for name in names[first:] + names[:first]}
        for name, elapsed in marks.items():
            if turn >= _UNTIMED:
                times[name].append(elapsed())
    return {name: sorted(values)[len(values) // 2] for name, values in times.items()}


@contextmanager
def _held(occupant: Occupant | None) -> Iterator[None]:
    if occupant is None:
        yield
        return
    occupant.start()
    yield
    occupant.end()


def _timed(run: Callable[[], object], where: Tensor, ahead: bool, occupant: Occupant | None) -> Callable[[], float]:
    """Runs it; what is returned gives the milliseconds, once they are known."""
    if not where.is_cuda:
        with _held(occupant):
            start = time.perf_counter()
            run()
            ms = (time.perf_counter() - start) * 1e3
        return lambda: ms
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    if ahead:
        torch.cuda._sleep(_AHEAD_CYCLES)
    with _held(occupant):
        begin.record()
        run()
        end.record()

    def elapsed() -> float:
        end.synchronize()
        return float(begin.elapsed_time(end))

    return elapsed
