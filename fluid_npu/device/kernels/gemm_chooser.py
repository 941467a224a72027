"""Which form a grouped matmul takes: forced, from a stored profile, measured on first use, or by rule.

A decision belongs to a class of calls: operation, dtype, K, N, groups, rows a group to a power of two, equal sizes or
not, alignment, alone or beside an AllToAll (``beside``). The first rank that meets a class decides it for the job
(``agreement``). Measuring runs the candidates on the call's own operands; a form that raises or whose result is off is
left out. R rows, K inner, N outer, L groups.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fluid_npu.device.base import DeviceUnavailable
from fluid_npu.device.choice import Choice
from fluid_npu.device.kernels.agreement import Agreement, of_this_job
from fluid_npu.device.kernels.gemm_beside import occupant_of
from fluid_npu.device.kernels.gemm_forms import FORMS, Form, GemmCall, Joined, equal_groups
from fluid_npu.device.kernels.gemm_timing import Trial, room_to_measure, try_forms
from fluid_npu.device.kernels.groups import DeviceRows
from fluid_npu.device.kernels.triton_support import GEMM_PROFILE, GROUPED_GEMM, setting

_SMALL = 5e8  # multiply-adds: below, launches decide and measuring costs more than it gives
_LOOP_FLOOR = 2e10  # multiply-adds a group, at 700 TFLOP/s 57 us: the host launches faster than that
_LEAD = 0.97  # a form must need less than this share of the rule's time to replace it
_BUDGET_S = 30.0


class GemmChooser:
    """Decides per class of calls and remembers.

    Args:
        agreement: how the ranks of a job come to one decision; None takes the job's store.
        forms: what there is to choose from, by name.
        budget_s: no further form is tried in a class after so many seconds, compilation included.
    """

    def __init__(
        self, agreement: Agreement | None = None, forms: Mapping[str, Form] | None = None, budget_s: float = _BUDGET_S
    ) -> None:
        self._agreement = agreement
        self._forms: dict[str, Form] = {**(FORMS if forms is None else forms)}
        self._forms[Joined.name] = Joined(self.compute)
        self._budget_s = budget_s
        self._decided: dict[str, Choice[str]] = {}
        self._quick: dict[Any, str] = {}

    def compute(self, call: GemmCall) -> Tensor | None:
        """The call's result in the chosen form; None where it is added to ``call.out``."""
        key = _key(call)
        name = self._quick.get(key)
        if name is None:
            name = self.choose(call).value
            if not _capturing(call):
                self._quick[key] = name
        return self._forms[name].run(call)

    def choose(self, call: GemmCall) -> Choice[str]:
        """The name of the form for this call, which has rows, and why.

        Raises DeviceUnavailable when the environment forces a form that does not fit the call, ValueError for a
        form or a profile that does not exist.
        """
        wanted = setting(GROUPED_GEMM, ("auto", "rule", "triton", *(n for n in self._forms if n != Joined.name)))
        if wanted not in ("auto", "rule"):
            return self._forced(wanted, call)
        if wanted == "rule" or call.multiply_adds < _SMALL or _capturing(call):
            return self._by_rule(call)
        name = class_of(call)
        known = self._decided.get(name)
        if known is None:
            known = self._decided[name] = self._decide(name, call)
        if self._forms[known.value].why_not(call) is None:
            return known
        return self._by_rule(call)

    def decisions(self) -> dict[str, dict[str, str]]:
        """What was decided in this process, as ``FLUID_GEMM_PROFILE`` takes it: class to form and reason."""
        return {name: {"form": chosen.value, "reason": chosen.reason} for name, chosen in self._decided.items()}

    def _decide(self, name: str, call: GemmCall) -> Choice[str]:
        stored = _profile(os.environ.get(GEMM_PROFILE, ""), tuple(self._forms)).get(name)
        if stored is not None:
            chosen = Choice(stored, f"stored in {GEMM_PROFILE}")
        else:
            form, _, reason = (self._agreement or of_this_job())(
                f"grouped matmul {name}", lambda: " ".join(self._measured(call))
            ).partition(" ")
            chosen = Choice(form, reason)
        return chosen.announce(f"grouped matmul {name}")

    def _measured(self, call: GemmCall) -> Choice[str]:
        rule = self._by_rule(call)
        no_room = room_to_measure(call)
        if no_room is not None:
            return Choice(rule.value, f"{rule.reason}; not measured: {no_room}")
        names = [rule.value, *(n for n, form in self._forms.items() if n != rule.value and form.why_not(call) is None)]
        end = time.monotonic() + self._budget_s
        occupant, held = occupant_of(call)
        trials = try_forms({name: self._forms[name] for name in names}, call, lambda: time.monotonic() > end, occupant)
        return _fastest(rule, trials, names, held)

    def _by_rule(self, call: GemmCall) -> Choice[str]:
        groups = len(call.counts)
        if isinstance(call.counts, DeviceRows):
            return self._by_rule_on_device(call)
        if call.more:
            return Choice(Joined.name, "rule: rows are put together, so that main_grad is read and written once")
        if call.multiply_adds >= _LOOP_FLOOR * groups:
            return Choice("loop", f"rule: {call.multiply_adds / groups:.1e} multiply-adds a group keep a GPU busy")
        for name in ("batched", "grouped_mm"):
            if name in self._forms and self._forms[name].why_not(call) is None:
                return Choice(name, f"rule: {groups} groups are too small for a launch each")
        return Choice("loop", "rule: nothing else takes these operands")

    def _by_rule_on_device(self, call: GemmCall) -> Choice[str]:
        names = ("grouped_mm", *(name for name in self._forms if name.startswith("triton-")))
        for name in names:
            if name in self._forms and self._forms[name].why_not(call) is None:
                return Choice(name, "rule: only the device knows the rows of each group")
        why = self._forms[names[-1]].why_not(call) if names[-1] in self._forms else "no Triton form"
        return Choice("loop", f"rule: the host waits for the rows of each group, since nothing else fits ({why})")

    def _forced(self, wanted: str, call: GemmCall) -> Choice[str]:
        names = [n for n in self._forms if n.startswith("triton-")] if wanted == "triton" else [wanted]
        reasons = {name: self._forms[name].why_not(call) for name in names}
        fitting = [name for name, reason in reasons.items() if reason is None]
        if fitting:
            return Choice(fitting[0], f"{GROUPED_GEMM}={wanted}")
        if call.more and self._forms[Joined.name].why_not(call) is None:
            return Choice(Joined.name, f"{GROUPED_GEMM}={wanted} then takes rows in one buffer")
        missing = "; ".join(dict.fromkeys(str(reason) for reason in reasons.values()))
        raise DeviceUnavailable(f"{GROUPED_GEMM}={wanted} ({class_of(call)}): {missing}; unset it to choose by call")


def _key(call: GemmCall) -> tuple[Any, ...]:
    """All that ``choose`` looks at, without making text of it; calls with the same key take the same form."""
    if call.more:
        total = (call.rows // len(call.counts)).bit_length(), call.multiply_adds < _SMALL
        return total, tuple(_key(piece) for piece in call.pieces)
    a, b, out, work, groups = call.a, call.b, call.out, call.multiply_adds, len(call.counts)
    size = (call.rows // groups).bit_length(), work < _SMALL, work >= _LOOP_FLOOR * groups, _evenness(call)
    shape = groups, a.shape[1], b.shape[1:], a.stride(), b.stride(), a.data_ptr() % 16, b.data_ptr() % 16
    target = None if out is None else (out.dtype, out.is_contiguous())
    return call.beside, os.environ.get(GROUPED_GEMM), call.op, a.dtype, b.dtype, a.device, size, shape, target


def class_of(call: GemmCall) -> str:
    """The class of a call: equal on ranks that make the same call on as many rows to a power of two."""
    groups, inner, outer = call.weight_shape
    rows = max(1, call.rows // groups)
    even = _evenness(call)
    operands = [t for piece in call.pieces for t in (piece.a, piece.b)]
    aligned = "aligned" if all(map(_aligned, operands)) else "unaligned"
    pieces = f"-P{1 + len(call.more)}" if call.more else ""
    dtype = str(call.a.dtype).removeprefix("torch.")
    size = f"K{inner}-N{outer}-L{groups}-rows{1 << (rows.bit_length() - 1)}"
    return f"{call.op}-{dtype}-{size}-{even}-{aligned}{pieces}{'-beside' if call.beside else ''}"


def _evenness(call: GemmCall) -> str:
    if isinstance(call.counts, DeviceRows):
        return "unknown"
    return "even" if all(equal_groups(piece.counts) for piece in call.pieces) else "uneven"


def _fastest(rule: Choice[str], trials: Mapping[str, Trial], names: list[str], held: str) -> Choice[str]:
    right = {name: trial.ms for name, trial in trials.items() if trial.ms is not None}
    if not trials:
        return Choice(rule.value, f"{rule.reason}; no time for {', '.join(names)}")
    if not right:
        wrong = "; ".join(f"{name}: {trial.failure}" for name, trial in trials.items())
        raise RuntimeError(f"no form of this grouped matmul works here: {wrong}")
    best = min(right, key=lambda name: right[name])
    if rule.value in right and right[best] > _LEAD * right[rule.value]:
        best = rule.value
    told = [f"{name} {ms:.3f} ms" for name, ms in sorted(right.items(), key=lambda entry: entry[1])]
    told += [f"{name} left out: {trial.failure}" for name, trial in trials.items() if trial.ms is None]
    if len(trials) < len(names):
        told.append(f"no time for {', '.join(names[len(trials) :])}")
    return Choice(best, f"measured{', ' if held else ''}{held}: " + ", ".join(told))


def _capturing(call: GemmCall) -> bool:
    return call.a.is_cuda and torch.cuda.is_current_stream_capturing()


def _aligned(x: Tensor) -> bool:
    return x.data_ptr() % 16 == 0 and all(s * x.element_size() % 16 == 0 for s in x.stride() if s != 1)


@cache
def _profile(path: str, forms: tuple[str, ...]) -> dict[str, str]:
    """Class to form of a stored profile. Raises ValueError for a file that is none."""
    if not path:
        return {}
    try:
        entries = {str(name): str(entry["form"]) for name, entry in json.loads(Path(path).read_text()).items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{GEMM_PROFILE}={path}: no readable profile ({type(error).__name__}: {error}); "
            "write one with scripts/gpu_kernels.sh, or unset it"
        ) from error
    unknown = sorted(set(entries.values()) - set(forms))
    if unknown:
        raise ValueError(f"{GEMM_PROFILE}={path}: unknown forms {', '.join(unknown)}; allowed are {', '.join(forms)}")
    return entries
