"""When a layer is recorded, when it is replayed and when it runs as ever: with a recorder that calls the body again."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from fluid_npu.schedule.graphed import GraphedLayer
from fluid_npu.schedule.scheduler import BackwardScheduler
from tests.support.fake_graph import FakeRecorder

pytestmark = pytest.mark.host


class Product(torch.nn.Module):
    """x w^2; the gradient of ``fused`` goes into its main_grad, that of ``plain`` to autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = torch.nn.Parameter(torch.linspace(-1, 1, 12).view(4, 3))
        self.fused: Any = torch.nn.Parameter(torch.linspace(-1, 2, 9).view(3, 3))
        self.fused.main_grad = torch.zeros(3, 3)
        self.register_buffer("seen", torch.zeros(()))
        self.ran = 0

    def compute(self, x: Tensor) -> Tensor:
        self.ran += 1
        with torch.no_grad():
            self.seen += 1  # a side effect on a buffer is part of the recording
        return _AddsToMainGrad.apply((x @ self.plain).tanh(), self.fused)


class _AddsToMainGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Any) -> Tensor:
        ctx.weight = weight
        ctx.save_for_backward(h)
        return h @ weight

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        (h,) = ctx.saved_tensors
        ctx.weight.main_grad.addmm_(h.t(), dy)
        ctx.weight.grad_added_to_main_grad = True
        return dy @ ctx.weight.t(), torch.full_like(ctx.weight, float("nan"))  # a placeholder that nobody reads


class Bench:
    """A layer, its graphed form, its recorder, and what autograd delivered to ``fused``."""

    def __init__(self, graph: bool = True, warm_up: int = 2) -> None:
        self.module, self.recorder, self.delivered = Product(), FakeRecorder(), 0
        self.scheduler = BackwardScheduler()
        made = lambda: self.recorder
        self.outside: list[Tensor] = []
        outside = lambda: tuple(self.outside)
        layer = GraphedLayer(self.module, self.module.compute, lambda: self.scheduler, made, "it", warm_up, outside)
        self.layer: Any = layer if graph else self.module.compute
        self.module.fused.register_hook(self._count)

    def _count(self, grad: Tensor) -> Tensor:
        self.delivered += 1
        return torch.zeros_like(grad)  # as DDP's hook, it reads main_grad alone

    def step(self, seed: int, rows: int = 5) -> tuple[Tensor, Tensor | None]:
        x = torch.randn(rows, 4, generator=torch.Generator().manual_seed(seed)).requires_grad_()
        out = self.layer(x)
        (out * out.detach().cos()).sum().backward()
        return out.detach(), x.grad

    def gradients(self) -> list[Tensor]:
        return [self.module.plain.grad.clone(), self.module.fused.main_grad.clone()]


def test_replays_accumulate_what_eager_steps_do() -> None:
    ours, eager = Bench(), Bench(graph=False)
    for seed in range(7):
        if seed == 4:  # a new step: gradients are zeroed in place, the flag is reset, the weights have moved
            for bench in (ours, eager):
                bench.module.plain.grad = None
                bench.module.fused.main_grad.zero_()
                bench.module.fused.grad_added_to_main_grad = False
                with torch.no_grad():
                    bench.module.plain.mul_(0.5)
        got, wanted = ours.step(seed), eager.step(seed)
        assert all(map(torch.equal, got, wanted)), seed
        assert all(map(torch.equal, ours.gradients(), eager.gradients())), seed
        assert ours.delivered == eager.delivered == seed + 1, "hooks on the weight fire at every backward"
        assert ours.module.fused.grad_added_to_main_grad
    assert ours.recorder.replays == [5, 5] and ours.layer.recorded


def test_results_of_a_replay_outlive_the_next() -> None:
    ours = Bench(warm_up=0)
    first, grad = ours.step(1)
    kept = first.clone(), grad.clone()
    ours.step(2)
    assert torch.equal(first, kept[0]) and torch.equal(grad, kept[1])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda b: 6, "shape, dtype or device of the input"),
        (lambda b: b.module.eval(), "a mode or the transport"),
        (lambda b: setattr(b.module.fused, "main_grad", torch.zeros(3, 3)), "a parameter"),
        (lambda b: b.module.plain.requires_grad_(False), "a parameter"),
        (lambda b: setattr(b.module.plain, "data", b.module.plain.data.clone()), "a parameter"),
        (lambda b: setattr(b.module, "seen", torch.zeros(())), "a buffer"),
        (lambda b: b.outside.append(torch.zeros(1)), "a tensor outside the layer"),
        (lambda b: setattr(b.scheduler.recorder, "enabled", True), "the scheduler's recorder is on"),
        (lambda b: setattr(b.scheduler, "submit", b.scheduler.submit), "a clock"),
    ],
    ids=["shape", "mode", "main_grad", "frozen", "moved", "buffer", "outside", "recorder", "clock"],
)
def test_what_is_not_as_recorded_runs_as_ever_with_a_reason(
    change: Any, said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fluid_npu.device import choice

    monkeypatch.setattr(choice, "_announced", {})
    ours = Bench(warm_up=0)
    ours.step(0)
    assert ours.recorder.replays == [1, 1]
    kept = change(ours)  # held, so that no other memory gets the old address
    ours.step(1, rows=kept if isinstance(kept, int) else 5)
    assert ours.recorder.replays == [1, 1], kept
    assert said in capsys.readouterr().out


def test_what_a_recording_keeps_is_known() -> None:
    ours = Bench(warm_up=1)
    ours.step(0)
    assert ours.layer.held_bytes == 0, "nothing is recorded yet"
    ours.step(1)
    # x; the output, as dy; gradients of x and of ``plain``, and the placeholder of ``fused``
    tokens, out, gradient = 5 * 4, 5 * 3, 5 * 4 + 4 * 3 + ours.module.fused.numel()
    assert ours.layer.held_bytes == 4 * (tokens + 2 * out + gradient)


def test_a_placeholder_takes_no_memory_of_its_own_unless_a_hook_adds_it() -> None:
    ours, seen = Bench(warm_up=1), []
    ours.module.fused._backward_hooks.clear()  # whose results are new tensors
    ours.module.fused.register_hook(lambda grad: seen.append((grad.data_ptr(), float(grad.abs().sum()))))
    for seed in range(4):
        ours.step(seed)
        ours.module.fused.grad = None
    recorded = ours.layer._recording.grads[1:]
    own = {grad.data_ptr() for grad in recorded if grad is not None}
    assert len(seen) == 4 and {address for address, _ in seen[1:]} <= own
    ours.module.fused.zero_out_wgrad = True
    ours.step(4)
    assert seen[-1][0] not in own and seen[-1][1] == 0.0


def test_the_serialised_twin_runs_as_ever_and_the_next_step_is_replayed() -> None:
    ours = Bench(warm_up=0)
    ours.step(0)
    with ours.scheduler.serialise():
        ours.step(1)
    assert ours.recorder.replays == [1, 1]
    ours.step(2)
    assert ours.recorder.replays == [2, 2]


def test_without_gradients_nothing_is_recorded_or_replayed() -> None:
    ours = Bench(warm_up=0)
    with torch.no_grad():
        ours.layer(torch.ones(5, 4))
    assert not ours.layer.recorded
    ours.step(0)
    with torch.no_grad():
        ours.layer(torch.ones(5, 4))
    assert ours.recorder.replays == [1, 1]


def test_calls_that_differ_are_not_counted_as_warm_up() -> None:
    ours = Bench(warm_up=2)
    for rows in (5, 6, 5, 5):
        ours.step(rows, rows=rows)
        assert not ours.layer.recorded
    ours.step(0)
    assert ours.layer.recorded


def test_a_second_forward_before_the_backward_runs_as_ever() -> None:
    ours, eager = Bench(warm_up=0), Bench(graph=False)
    for bench in (ours, eager):
        outs = [bench.layer(torch.full((5, 4), float(n)).requires_grad_()) for n in range(3)]
        for out in reversed(outs):
            out.sum().backward()
    assert ours.recorder.replays == [1, 1]
    assert all(map(torch.equal, ours.gradients(), eager.gradients()))
    del out, outs
    dropped = ours.layer(torch.ones(5, 4, requires_grad=True))
    del dropped  # a forward that nobody goes back through does not block the next
    ours.step(0)
    assert ours.recorder.replays == [3, 2]


def test_a_second_backward_through_a_replay_is_an_error() -> None:
    ours = Bench(warm_up=0)
    out = ours.layer(torch.ones(5, 4, requires_grad=True))
    out.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a second time"):
        out.sum().backward()


def test_what_cannot_be_recorded_runs_as_ever_for_good() -> None:
    class Refuses(FakeRecorder):
        def record(self, body: Any) -> Any:
            body()
            raise RuntimeError("operation not permitted when stream is capturing")

    ours, eager = Bench(warm_up=0), Bench(graph=False)
    ours.recorder = Refuses()
    for seed in range(3):
        assert all(map(torch.equal, ours.step(seed), eager.step(seed)))
    assert not ours.layer.recorded and ours.module.ran == 4, "one attempt"
    assert all(map(torch.equal, ours.gradients(), eager.gradients()))
    assert ours.module.plain in set(ours.module.parameters()), "the twins are gone"


def test_what_others_could_not_record_runs_as_ever_for_good(capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[str] = []
    ours, eager = Bench(warm_up=0), Bench(graph=False)
    ours.layer._agree = lambda failed: asked.append(failed) or "rank 1: no memory"
    for seed in range(3):
        assert all(map(torch.equal, ours.step(seed), eager.step(seed)))
    assert not ours.layer.recorded and asked == [""] and ours.recorder.replays == [0, 0]
    assert "graph of it: as ever (it cannot be recorded (rank 1: no memory))" in capsys.readouterr().out


def test_a_replay_counts_what_the_recording_would_have() -> None:
    scheduler = BackwardScheduler()
    with scheduler.tallied() as tally:
        scheduler.comm.count("moe_dispatch", 100, 300)
        scheduler.comm.timed("moe_dispatch", *[None] * 3, True)  # type: ignore[arg-type]
    assert scheduler.get_stats()["a2a_count"] == 0
    for _ in range(2):
        scheduler.count_again(tally)
    stats = scheduler.get_stats()
    assert (stats["a2a_count"], stats["a2a_bytes"], stats["a2a_plain_bytes"]) == (2, 200, 600)


class _Room:
    """A room that some replays lack."""

    def __init__(self, lacking: set[int]) -> None:
        self._lacking, self._replays, self._replay = lacking, 0, False
        self.settled = 0

    def settle(self, x: Tensor) -> str:
        self.settled += 1
        return ""

    def forget(self) -> None: ...

    def kept_to(self) -> Any:
        return nullcontext()

    def ask(self, replay: bool) -> None:
        self._replay = replay
        self._replays += replay

    def sufficed(self) -> bool:
        return not (self._replay and self._replays in self._lacking)


@pytest.mark.parametrize(
    ("lacking", "agreements"), [({1, 2, 3}, 2), ({1, 50, 100}, 2), ({1, 50, 101}, 1), ({1, 90, 180, 189}, 2)]
)
def test_a_layer_that_seldom_lacks_room_keeps_its_recording(lacking: set[int], agreements: int) -> None:
    bench, room = Bench(), _Room(lacking)
    made = lambda: bench.recorder
    layer = GraphedLayer(bench.module, bench.module.compute, lambda: bench.scheduler, made, room=room)
    for number in range(200):
        layer(torch.full((5, 4), float(number), requires_grad=True)).sum().backward()
    assert room.settled == agreements and layer.recorded
