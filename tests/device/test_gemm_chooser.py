"""Which form a grouped matmul takes: measured, stored, forced or by rule, and the same on all ranks."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fluid_npu.device import DeviceUnavailable
from fluid_npu.device.kernels import gemm_chooser, gemm_timing, triton_support
from fluid_npu.device.kernels.agreement import StoreAgreement, alone
from fluid_npu.device.kernels.beside import beside_exchange
from fluid_npu.device.kernels.cuda_kernels import CudaKernels
from fluid_npu.device.kernels.gemm_chooser import GemmChooser, class_of
from fluid_npu.device.kernels.gemm_forms import FORMS, GemmCall, Loop, TritonForm, call_of_pieces
from fluid_npu.device.kernels.gemm_timing import Trial, try_forms
from fluid_npu.device.kernels.groups import DeviceRows
from fluid_npu.device.kernels.pieces import DWPart, PieceRows
from fluid_npu.ops import reference
from fluid_npu.ops.reference import relative_error

#: A torch before 2.10: its grouped matmul is not used.
NO_NATIVE = "has no grouped_mm" in str(
    FORMS["grouped_mm"].why_not(GemmCall(op="mm", a=torch.ones(2, 2), b=torch.ones(1, 2, 2), counts=[2]))
)

pytestmark = pytest.mark.host

COUNTS = [3, 0, 5, 4]


def call_of(op: str = "mm", counts: list[int] | None = None, dtype: torch.dtype = torch.float32) -> GemmCall:
    counts = COUNTS if counts is None else counts
    torch.manual_seed(0)
    x, w, dy = torch.randn(sum(counts), 8), torch.randn(len(counts), 8, 16), torch.randn(sum(counts), 16)
    x, w, dy = x.to(dtype), w.to(dtype), dy.to(dtype)
    if op == "mm_t":
        return GemmCall(op=op, a=x, b=w.transpose(1, 2).contiguous(), counts=counts)
    if op == "mm":
        return GemmCall(op=op, a=x, b=w, counts=counts)
    out = torch.ones(len(counts), 8, 16) if op == "dw_add" else None
    return GemmCall(op=op, a=x, b=dy, counts=counts, out=out)


class Wrong(Loop):
    """Right but for one entry."""

    name = "wrong"

    def run(self, call: GemmCall) -> Tensor | None:
        result = super().run(call)
        (result if result is not None else call.out).view(-1)[3] += 1.0
        return result


class Broken(Loop):
    name = "broken"

    def run(self, call: GemmCall) -> Tensor | None:
        raise RuntimeError("no compiler here")


class Never(Loop):
    name = "never"

    def why_not(self, call: GemmCall) -> str | None:
        return "the moon is not full"


def timed(monkeypatch: pytest.MonkeyPatch, milliseconds: dict[str, float]) -> list[str]:
    """Forms that are right take these times; returns the list of forms that were tried."""
    tried: list[str] = []

    def trials(forms: dict[str, Any], call: GemmCall, late: Callable[[], bool], *beside: Any) -> dict[str, Trial]:
        real = try_forms(forms, call, late, *beside)
        tried.extend(real)
        return {name: t if t.ms is None else Trial(milliseconds[name]) for name, t in real.items()}

    monkeypatch.setattr(gemm_chooser, "try_forms", trials)
    monkeypatch.setattr(gemm_chooser, "_SMALL", 0)
    return tried


def try_form(form: Loop, call: GemmCall) -> Trial:
    return try_forms({form.name: form}, call, lambda: False)[form.name]


def forms(*extra: Loop) -> dict[str, Any]:
    return {"loop": Loop(), **{form.name: form for form in extra}}


class Other(Loop):
    name = "other"


def wanted(call: GemmCall) -> Tensor:
    if call.op in ("mm", "mm_t"):
        return reference.grouped_matmul(call.a, call.weight(), call.counts)
    return reference.grouped_dw(call.a, call.b, call.counts)


@pytest.mark.parametrize("counts", [COUNTS, [3, 3, 3]], ids=str)
@pytest.mark.parametrize("op", ["mm", "mm_t", "dw", "dw_add"])
@pytest.mark.parametrize("name", ["loop", "grouped_mm", "batched"])
def test_every_form_that_torch_has_is_right_or_says_why_it_does_not_fit(name: str, op: str, counts: list[int]) -> None:
    call = call_of(op, counts)
    reason = FORMS[name].why_not(call)
    if reason is not None:
        assert (name == "batched" and "these have 0 to 5 rows" in reason) or (name == "grouped_mm" and NO_NATIVE)
        return
    got = FORMS[name].run(call)
    assert (got is None) == (op == "dw_add")
    result = got if got is not None else call.out - 1  # type: ignore[operator]
    assert relative_error(result, wanted(call)) <= 1e-6


def test_the_fastest_right_form_is_taken_once_for_its_class(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    tried = timed(monkeypatch, {"loop": 5.0, "other": 1.0})
    chooser = GemmChooser(alone, forms(Other(), Wrong(), Broken(), Never()))
    for _ in range(2):
        value, reason = chooser.choose(call_of())
    assert value == "other" and tried == ["loop", "other", "wrong", "broken"]
    assert "other 1.000 ms, loop 5.000 ms" in reason
    assert "wrong left out: off by" in reason and "broken left out: RuntimeError: no compiler here" in reason
    assert capsys.readouterr().out.count(f"grouped matmul {class_of(call_of())}: other") == 1


def on_device(op: str, room: int = 7) -> GemmCall:
    """``call_of`` in buffers with room for more rows, whose number only the device is told; behind them is NaN."""
    call = call_of(op)
    rows = DeviceRows(len(COUNTS), sum(COUNTS) + room, expected=16)
    rows.settle(torch.tensor(COUNTS).cumsum(0))
    behind = [torch.full((room, x.shape[1]), float("nan")) for x in (call.a, call.b) if x.dim() == 2]
    both = [torch.cat(pair) for pair in zip((call.a, call.b), behind, strict=False)]
    return replace(call, a=both[0], b=both[1] if len(both) > 1 else call.b, counts=rows)


class OnDevice(Loop):
    name = "triton-like"

    def why_not(self, call: GemmCall) -> str | None:
        return None


@pytest.mark.parametrize("op", ["mm", "mm_t", "dw", "dw_add"])
def test_rows_that_only_the_device_knows_have_no_form_that_wants_them_on_the_host(
    op: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = timed(monkeypatch, {"triton-like": 9.0})
    of_torch = {name: FORMS[name] for name in ("loop", "grouped_mm", "batched")}
    call, chooser = on_device(op), GemmChooser(alone, {**of_torch, "triton-like": OnDevice()})
    assert all("only the device knows" in str(FORMS[name].why_not(call)) for name in ("loop", "batched"))
    assert NO_NATIVE or "leaves the sizes on the device only for bf16" in str(FORMS["grouped_mm"].why_not(call))
    value, reason = chooser.choose(call)
    assert value == "triton-like" and tried == ["triton-like"], "a third of the time would not make the loop fit"
    assert class_of(call).endswith("-rows4-unknown-aligned") and "measured" in reason
    got = chooser.compute(call)
    result = call.out - 1 if got is None else got  # type: ignore[operator]
    used = result[: sum(COUNTS)] if op in ("mm", "mm_t") else result
    assert relative_error(used, wanted(call_of(op))) <= 1e-6


def test_without_any_form_for_the_device_the_loop_reads_the_rows_and_says_so() -> None:
    call = on_device("mm")
    value, reason = GemmChooser(alone, forms()).choose(call)
    assert value == "loop" and "the host waits for the rows of each group" in reason
    product = Loop().run(call)
    assert product is not None and product.shape[0] == call.a.shape[0]
    assert relative_error(product[: sum(COUNTS)], wanted(call_of("mm"))) <= 1e-6


def test_a_lead_within_the_noise_leaves_the_rule_s_form(monkeypatch: pytest.MonkeyPatch) -> None:
    timed(monkeypatch, {"loop": 1.0, "other": 0.98})
    assert GemmChooser(alone, forms(Other())).choose(call_of()).value == "loop"


def test_no_form_is_tried_after_the_time_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = timed(monkeypatch, {"loop": 1.0, "other": 0.1})
    value, reason = GemmChooser(alone, forms(Other()), budget_s=-1.0).choose(call_of())
    assert tried == [] and value == "loop"
    assert "no time for loop, other" in reason


def test_small_calls_and_the_rule_setting_measure_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = timed(monkeypatch, {"loop": 5.0, "other": 1.0})
    monkeypatch.setattr(gemm_chooser, "_SMALL", 1e9)
    assert GemmChooser(alone, forms(Other())).choose(call_of()).value == "loop"
    monkeypatch.setattr(gemm_chooser, "_SMALL", 0)
    monkeypatch.setenv("FLUID_GROUPED_GEMM", "rule")
    assert GemmChooser(alone, forms(Other())).choose(call_of()).reason.startswith("rule:")
    assert tried == []


@pytest.mark.parametrize(
    "floor, even, chosen",
    [(0.0, False, "loop"), (1e12, True, "batched"), (1e12, False, "loop" if NO_NATIVE else "grouped_mm")],
)
def test_the_rule(floor: float, even: bool, chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm_chooser, "_LOOP_FLOOR", floor)
    assert GemmChooser(alone).choose(call_of(counts=[3, 3] if even else COUNTS)).value == chosen


def test_measuring_leaves_main_grad_and_the_random_numbers_alone() -> None:
    call = call_of("dw_add")
    state = torch.get_rng_state()
    assert try_form(Loop(), call).ms is not None
    assert torch.equal(call.out, torch.ones(4, 8, 16)) and torch.equal(torch.get_rng_state(), state)  # type: ignore[arg-type]


@pytest.mark.parametrize("op", ["mm", "dw", "dw_add"])
def test_one_wrong_entry_is_found(op: str) -> None:
    assert "off by" in try_form(Wrong(), call_of(op)).failure


def test_beside_an_exchange_is_a_class_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"loop": 1.0, "other": 2.0}
    timed(monkeypatch, times)
    chooser = GemmChooser(alone, forms(Other()))
    assert chooser.choose(call_of()).value == "loop"
    times.update({"loop": 3.0})
    with beside_exchange():
        value, reason = chooser.choose(call_of())
    assert value == "other" and reason.startswith("measured, nothing held: not on a GPU: other 2.000 ms")
    with beside_exchange(False):
        assert chooser.choose(call_of()).value == "loop"
    assert sorted(chooser.decisions()) == [class_of(call_of()), f"{class_of(call_of())}-beside"]
    with beside_exchange():
        assert not torch.equal(chooser.compute(call_of()), torch.zeros(12, 16)) and chooser._quick  # type: ignore[arg-type]
    chooser.compute(call_of())
    assert sorted(chooser._quick.values()) == ["loop", "other"]


def test_an_occupant_holds_while_a_form_runs_and_no_longer() -> None:
    order: list[str] = []

    class Noted:
        def start(self) -> None:
            order.append("start")

        def end(self) -> None:
            order.append("end")

    gemm_timing.median_ms({"a": lambda: order.append("a")}, torch.zeros(1), occupant=Noted())  # type: ignore[arg-type]
    assert order[:6] == ["start", "a", "end"] * 2


def test_forms_are_timed_in_turns() -> None:
    order: list[str] = []
    gemm_timing.median_ms({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, torch.zeros(1))
    turns = [order[at : at + 2] for at in range(0, len(order), 2)]
    assert turns[:4] == [["a", "b"], ["b", "a"]] * 2 and len(turns) > 6


def test_a_call_like_an_earlier_one_costs_no_second_look(monkeypatch: pytest.MonkeyPatch) -> None:
    chooser, asked = GemmChooser(alone, forms(Other())), []
    monkeypatch.setattr(
        GemmChooser, "choose", lambda self, call: asked.append(call.op) or gemm_chooser.Choice("other", "")
    )
    for counts in (COUNTS, COUNTS, [4, 4, 4, 4], [4, 4, 4, 4]):  # equal groups are another class
        chooser.compute(call_of(counts=counts))
    chooser.compute(call_of("dw_add"))
    monkeypatch.setenv("FLUID_GROUPED_GEMM", "loop")
    chooser.compute(call_of())
    assert asked == ["mm", "mm", "dw_add", "mm"]


def test_a_result_that_is_no_number_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    class NotANumber(Loop):
        def run(self, call: GemmCall) -> Tensor | None:
            result = super().run(call)
            return None if result is None else result.fill_(float("nan"))

    assert "off by inf" in try_form(NotANumber(), call_of()).failure


def test_a_stored_profile_replaces_measuring(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    tried = timed(monkeypatch, {"loop": 5.0, "other": 1.0})
    first = GemmChooser(alone, forms(Other()))
    first.choose(call_of())
    (tmp_path / "profile.json").write_text(json.dumps(first.decisions()))
    monkeypatch.setenv("FLUID_GEMM_PROFILE", str(tmp_path / "profile.json"))
    tried.clear()
    value, reason = GemmChooser(alone, forms(Other())).choose(call_of())
    assert (value, reason, tried) == ("other", "stored in FLUID_GEMM_PROFILE", [])


@pytest.mark.parametrize(
    "text, message",
    [(None, "no readable profile"), ("[]", "no readable"), ('{"a": {"form": "magic"}}', "unknown forms magic")],
)
def test_a_profile_that_is_none_is_refused(
    text: str | None, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    path = tmp_path / "profile.json"
    if text is not None:
        path.write_text(text)
    monkeypatch.setattr(gemm_chooser, "_SMALL", 0)
    monkeypatch.setenv("FLUID_GEMM_PROFILE", str(path))
    with pytest.raises(ValueError, match=f"FLUID_GEMM_PROFILE=.*{message}"):
        GemmChooser(alone).choose(call_of())


def test_a_forced_form_that_does_not_fit_is_an_error_that_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLUID_GROUPED_GEMM", "never")
    with pytest.raises(
        DeviceUnavailable, match="FLUID_GROUPED_GEMM=never .mm-float32-K8-N16.*the moon is not full; unset"
    ):
        GemmChooser(alone, forms(Never())).choose(call_of())
    monkeypatch.setenv("FLUID_GROUPED_GEMM", "fastest")
    with pytest.raises(ValueError, match="FLUID_GROUPED_GEMM='fastest': allowed are auto, rule, triton, loop"):
        GemmChooser(alone).choose(call_of())


def test_forcing_triton_without_triton_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_support.importlib, "import_module", missing)
    triton_support.probe_triton.cache_clear()
    monkeypatch.setenv("FLUID_GROUPED_GEMM", "triton")
    with pytest.raises(DeviceUnavailable, match="triton cannot be imported .*pip install triton"):
        GemmChooser(alone).choose(call_of())
    assert "pip install triton" in str(TritonForm(16, 16, 16, 4, 2).why_not(call_of()))
    triton_support.probe_triton.cache_clear()


def missing(name: str) -> Any:
    raise ModuleNotFoundError(f"No module named {name!r}")


IN_PIECES = [[3, 0, 5, 4], [0, 0, 0, 0], [0, 0, 2, 6]]


def pieces() -> tuple[list[DWPart], PieceRows, Tensor]:
    """Operands of a dW, their rows, and what adding it to ones gives. The second piece has no rows."""
    torch.manual_seed(0)
    parts = [DWPart(torch.randn(sum(c), 8), torch.randn(sum(c), 16), c) for c in IN_PIECES]
    dw = sum(reference.grouped_dw(*part) for part in parts)
    return parts, PieceRows(IN_PIECES, torch.tensor(IN_PIECES)), 1 + dw  # type: ignore[return-value]


class InPieces(Loop):
    """Reads pieces where they lie."""

    name = "triton-like"


@pytest.mark.parametrize("forced", ["rule", "loop", "batched"])
def test_a_dw_of_rows_in_pieces_is_one_sum_whatever_form_it_takes(forced: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLUID_GROUPED_GEMM", forced)
    (parts, rows, wanted), main_grad = pieces(), torch.ones(4, 8, 16)
    kernels = CudaKernels(GemmChooser(alone))
    call = call_of_pieces(main_grad, parts, rows)
    assert call is not None and len(call.more) == 1, "the piece without rows is left out"
    assert kernels.chooser.choose(call).value == ("loop" if forced == "loop" else "joined")
    try:
        kernels.grouped_dw_pieces_add_(main_grad, parts, rows)
    except DeviceUnavailable as error:  # what is forced does not fit what was joined either
        assert forced == "batched" and "FLUID_GROUPED_GEMM=batched" in str(error)
    else:
        assert relative_error(main_grad, wanted) <= 1e-6


def test_a_dw_of_rows_in_pieces_takes_the_form_that_was_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = timed(monkeypatch, {"loop": 5.0, "joined": 4.0, "triton-like": 1.0})
    (parts, rows, wanted), main_grad = pieces(), torch.ones(4, 8, 16)
    chooser = GemmChooser(alone, forms(InPieces(), Wrong()))
    kernels = CudaKernels(chooser)
    kernels.grouped_dw_pieces_add_(main_grad, parts, rows)
    assert relative_error(main_grad, wanted) <= 1e-6, "measuring adds nothing"
    (name, decision), *others = reversed(chooser.decisions().items())
    assert (
        name.endswith("-uneven-aligned-P2")
        and decision["form"] == "triton-like"
        and "wrong left out" in decision["reason"]
    )
    assert all("-P" not in other for other, _ in others) and {"joined", "triton-like", "wrong"} <= set(tried)
    for name in ("grouped_mm", "batched"):
        call = call_of_pieces(main_grad, parts, rows)
        assert call is not None and FORMS[name].why_not(call) == "the rows are in several pieces"


def test_pieces_of_which_one_or_none_has_rows_need_no_choice() -> None:
    parts, rows, _ = pieces()
    main_grad, kernels = torch.ones(4, 8, 16), CudaKernels(GemmChooser(alone))
    empty = PieceRows([IN_PIECES[1]] * 2, torch.zeros(2, 4, dtype=torch.int64))
    kernels.grouped_dw_pieces_add_(main_grad, [parts[1]] * 2, empty)
    assert torch.equal(main_grad, torch.ones(4, 8, 16))
    kernels.grouped_dw_pieces_add_(main_grad, parts[:2], PieceRows(IN_PIECES[:2], torch.tensor(IN_PIECES[:2])))
    assert relative_error(main_grad, 1 + reference.grouped_dw(*parts[0])) <= 1e-6


def test_more_pieces_than_the_kernel_reads_are_joined() -> None:
    parts, counts = pieces()[0], [IN_PIECES[0]] * 5
    call = call_of_pieces(torch.ones(4, 8, 16), [parts[0]] * 5, PieceRows(counts, torch.tensor(counts)))
    assert call is not None
    assert TritonForm(16, 16, 16, 4, 2).why_not(call) == "the Triton kernel reads up to 4 pieces, these are 5"


@pytest.mark.parametrize(
    "described, inner, refused", [(True, 8, "to be a multiple of 16"), (True, 32, None), (False, 8, None)]
)
def test_tensor_descriptors_refuse_weights_whose_last_step_would_read_the_next_group(
    described: bool, inner: int, refused: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from types import SimpleNamespace

    from fluid_npu.device import Choice
    from fluid_npu.device.kernels import gemm_forms

    monkeypatch.setattr(gemm_forms, "triton_on", lambda device: Choice(True, ""))
    monkeypatch.setattr(gemm_forms, "load", lambda name: SimpleNamespace(why_not_described=lambda *operands: None))
    a, b = torch.ones(4, inner, dtype=torch.float16), torch.ones(2, inner, 16, dtype=torch.float16)
    reason = TritonForm(16, 16, 16, 4, 2, described=described).why_not(GemmCall(op="mm", a=a, b=b, counts=[2, 2]))
    assert reason is None if refused is None else refused in str(reason)


def slow_here(fast: str) -> Callable[..., dict[str, Trial]]:
    return lambda forms, call, late, beside: {name: Trial(1.0 if name == fast else 9.0) for name in forms}


def decide_on_a_rank(classes: list[list[str]]) -> dict[str, str]:
    """Each rank measures its own form as the fastest; it meets the operations in its own order, or not at all."""
    import torch.distributed as dist

    rank = dist.get_rank()
    gemm_chooser.try_forms = slow_here(("loop", "other")[rank])
    gemm_chooser._SMALL = 0
    chooser = GemmChooser(forms=forms(Other()))
    for op in classes[rank]:
        chooser.choose(call_of(op))
    return {name: entry["form"] for name, entry in chooser.decisions().items()}


@pytest.mark.parametrize("classes", [[["mm", "dw"], ["dw", "mm"]], [["mm"], ["mm", "dw"]], [[], ["mm"]]], ids=str)
def test_ranks_that_measure_opposite_times_decide_alike(classes: list[list[str]], run_ranks: Any) -> None:
    first, second = run_ranks(2, decide_on_a_rank, classes)
    assert [len(first), len(second)] == [len(names) for names in classes]
    assert all(first[name] == second[name] for name in first.keys() & second.keys())


def test_a_rank_that_never_answers_is_named_by_its_question() -> None:
    import torch.distributed as dist

    store = dist.HashStore()
    store.add("fluid_npu/decision/which/asked", 1)
    with pytest.raises(RuntimeError, match="no answer to 'which' in 0 s"):
        StoreAgreement(store, timeout_s=0.05)("which", lambda: "me")


def test_no_room_to_measure_leaves_the_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = timed(monkeypatch, {"loop": 5.0, "other": 1.0})
    monkeypatch.setattr(gemm_chooser, "room_to_measure", lambda call: "it needs 9 MiB and 3 are free")
    value, reason = GemmChooser(alone, forms(Other())).choose(call_of())
    assert (value, tried) == ("loop", []) and reason.endswith("not measured: it needs 9 MiB and 3 are free")
    assert gemm_timing.room_to_measure(call_of()) is None


def test_a_dense_dw_beside_an_exchange_is_one_group_and_chosen_like_any(monkeypatch: pytest.MonkeyPatch) -> None:
    timed(monkeypatch, {"loop": 5.0, "other": 1.0})
    torch.manual_seed(0)
    x, dy = torch.randn(12, 8), torch.randn(12, 16)
    alone_grad, beside_grad = torch.ones(16, 8), torch.ones(16, 8)
    kernels = CudaKernels(GemmChooser(alone, forms(Other())))
    kernels.dense_dw_add_(alone_grad, x, dy)
    assert not kernels.chooser.decisions()
    with beside_exchange():
        kernels.dense_dw_add_(beside_grad, x, dy)
    ((name, decision),) = kernels.chooser.decisions().items()
    assert name.startswith("dw_add-float32-K16-N8-L1-") and name.endswith("-beside") and decision["form"] == "other"
    for grad in (alone_grad, beside_grad):
        assert relative_error(grad, 1 + dy.double().t() @ x.double()) <= 1e-6
