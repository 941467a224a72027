"""Data-parallel reduction during the backward: when buckets are ready, and what runs beside the last reduction."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest

from tests.support.clock import planted_time
from tests.support.gpt import Run, batch, check_trained, fill, make_config, make_model, same_bits, train_all
from tests.support.moe import ForcedRouter
from tests.support.order_of_steps import exchanges_of_clean_steps, recorded_steps

Ranks = Callable[..., list[Any]]
FP32 = 1e-5
EP_2 = {"expert_model_parallel_size": 2}
DDP: dict[str, Any] = {"delay_wgrad_compute": True, "overlap_grad_reduce": True, "grad_reduce_in_fp32": True}
#: One bucket for all dense weights and one for all experts, or (a small size) one for each weight.
SMALL = {"bucket_size": 2000}
MODEL = Run(micro_batches=2, ddp=DDP, spec={"carry_over": True}, config={"moe_router_topk": 3})


class Steps:
    """A model under Megatron's DDP and its steps. ``empty``: so many experts, the last, get no token."""

    def __init__(self, run: Run, empty: int = 0, keeps: bool = True) -> None:
        from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

        from fluid_npu.schedule.live import get_backward_scheduler

        config = make_config(run)
        self.run, model = run, make_model(run, config)
        fill(model, run)
        for layer in model.decoder.layers:
            ForcedRouter(layer.mlp, empty)
            if not keeps:
                layer.mlp._keeps_for_reduction = lambda: False
        self.ddp = DistributedDataParallel(config, DistributedDataParallelConfig(**run.ddp), model)
        self.scheduler = get_backward_scheduler(self.ddp)
        self.names = {parameter: name for name, parameter in model.named_parameters()}

    def __call__(self, twin: bool = False) -> dict[str, Any]:
        """Gradients by name, the places of dW, and the order in which weights became ready in the last micro-batch."""
        import torch.distributed as dist
        from megatron.core.distributed import finalize_model_grads

        from fluid_npu.mcore.convert import gradients_by_name

        self.scheduler.recorder.enabled = True
        self.ddp.zero_grad_buffer()
        ready: list[str] = []
        groups = [*self.ddp.bucket_groups, *self.ddp.expert_parallel_bucket_groups]
        for group in groups:
            _watch(group, self.names, ready)
        for micro in range(self.run.micro_batches):
            last = micro == self.run.micro_batches - 1
            with ExitStack() as stack:
                if not last:
                    stack.enter_context(self.ddp.no_sync())
                if twin:
                    stack.enter_context(self.scheduler.serialise())
                self.ddp(**batch(dist.get_rank(), 0, micro)).float().mean().backward()
            if not last:
                ready.clear()
            assert self.scheduler.pending == 0
        finalize_model_grads([self.ddp])
        for group in groups:
            del group.register_grad_ready
        records = [record for record in self.scheduler.recorder.take() if record.kind == "dw"]
        return {
            "grads": {name: grad.clone() for name, grad in gradients_by_name(self.ddp).items()},
            "regions": [(record.name, record.detail["region"]) for record in records],
            "ready": ready,
        }


def _watch(group: Any, names: dict[Any, str], ready: list[str]) -> None:
    register = group.register_grad_ready

    def noted(param: Any, *rest: Any) -> None:
        ready.append(names[param])
        register(param, *rest)

    group.register_grad_ready = noted


def two_steps(run: Run, **how: Any) -> list[dict[str, Any]]:
    """Megatron reduces during the backward from the second step on."""
    steps = Steps(run, **how)
    return [steps(), steps()]


def ready_order() -> list[dict[str, Any]]:
    return [two_steps(MODEL)[1], two_steps(replace(MODEL, ddp={**DDP, **SMALL}))[1]]


def test_weights_become_ready_as_the_module_says(run_ranks: Ranks) -> None:
    """On 2 ranks with 2 expert-parallel ones nobody holds the same experts: FC2 of the lowest layer comes last."""
    for rank in run_ranks(2, ready_order, sizes=EP_2):
        for found in rank:
            layer = "decoder.layers.{}.{}".format
            first = ["output_layer.weight", "decoder.final_layernorm.weight", layer(1, "mlp.experts.weight1")]
            order = [name for name in found["ready"] if "layernorm" not in name or "final" in name]
            assert order[:3] == first
            late = [layer(1, name) for name in ("mlp.experts.weight2", "mlp.router.weight")]
            late += [layer(1, f"self_attention.linear_{name}.weight") for name in ("proj", "qkv")]
            assert order[3:7] == late
            lowest = ["mlp.experts.weight1", "mlp.router.weight", "self_attention.linear_proj.weight"]
            lowest = [layer(0, name) for name in (*lowest, "self_attention.linear_qkv.weight")]
            assert order[7:] == [*lowest, "embedding.word_embeddings.weight", layer(0, "mlp.experts.weight2")]
            regions = dict(found["regions"])
            assert regions["layer 1 fc2"] == "end of backward" and regions["layer 1 router"] == "at once"
            assert regions["layer 1 fc1"] == "backward of moe_dispatch AllToAll of layer 1"


def fc2_regions(runs: list[Run]) -> list[list[str]]:
    """Where FC2 of the lowest layer runs in each micro-batch of two steps."""
    return [
        [region for step in two_steps(run) for name, region in step["regions"] if name == "layer 1 fc2"] for run in runs
    ]


def test_fc2_waits_only_in_a_micro_batch_that_is_reduced_and_where_nobody_holds_its_experts(run_ranks: Ranks) -> None:
    flight, end = "backward of moe_dispatch AllToAll of layer 1", "end of backward"
    sums_late = replace(MODEL, ddp={**DDP, "overlap_grad_reduce": False})
    no_late = replace(MODEL, ddp={**DDP, "delay_wgrad_compute": False})
    sharded = replace(MODEL, ddp={**DDP, "use_distributed_optimizer": True})
    for found in run_ranks(2, fc2_regions, [MODEL, sums_late, no_late, sharded], sizes=EP_2):
        kept = [flight, flight, flight, end]
        assert found == [kept, [flight] * 4, [flight] * 4, kept]
    # Two pairs of ranks hold the same experts.
    for found in run_ranks(4, fc2_regions, [MODEL], sizes=EP_2):
        assert found == [[flight] * 4]


def both_ways(ep: int) -> list[dict[str, Any]]:
    """The second step, kept, its twin and not kept, with uneven routing and with a rank without rows."""
    found = []
    for empty in (0, 4):
        run = replace(MODEL, ep=ep, ddp={**DDP, **SMALL})
        kept, plain = Steps(run, empty), Steps(run, empty, keeps=False)
        kept(), plain()
        found.append({"kept": kept(), "twin": kept(twin=True), "plain": plain()})
    return found


@pytest.mark.parametrize("nproc", [2, 4])
def test_what_is_kept_changes_no_bit(nproc: int, run_ranks: Ranks) -> None:
    ranks = run_ranks(nproc, both_ways, 2, sizes=EP_2, timeout=200)
    for rank in ranks:
        for ways in rank:
            for other in ("twin", "plain"):
                assert not same_bits(ways["kept"]["grads"], ways[other]["grads"]), other
            assert ways["kept"]["regions"] == ways["twin"]["regions"]
    for number in range(2):
        for key in ("ready", "regions"):
            assert all(rank[number]["kept"][key] == ranks[0][number]["kept"][key] for rank in ranks)


@pytest.mark.parametrize("nproc", [2, 4])
def test_it_trains_as_stock_and_as_its_twin(nproc: int, run_ranks: Ranks) -> None:
    runs = [replace(MODEL, impl="stock", ddp={}, spec={}), MODEL, replace(MODEL, impl="twin")]
    for stock, ours, twin in run_ranks(nproc, train_all, runs, sizes=EP_2, timeout=200):
        check_trained(ours, stock, twin, FP32)


def test_the_order_of_a_training_step_is_clean(run_ranks: Ranks) -> None:
    results = run_ranks(2, recorded_steps, MODEL, sizes=EP_2)
    # Steps x micro-batches x layers x ranks: counts, and four exchanges.
    assert exchanges_of_clean_steps(results) == 2 * 2 * 2 * 2 * 5


REDUCTION_MS, DW_MS = 200.0, 250.0


class _Delayed:
    """A reduction that is done so long after its launch."""

    def __init__(self, handle: Any, waited: list[float]) -> None:
        self._handle, self._waited, self._until = handle, waited, time.monotonic() + REDUCTION_MS / 1e3

    def wait(self) -> None:
        start = time.perf_counter()
        time.sleep(max(0.0, self._until - time.monotonic()))
        self._handle.wait()
        self._waited.append((time.perf_counter() - start) * 1e3)


def planted_wait(keeps: bool) -> float:
    """Milliseconds in the wait for the dense bucket's reduction of a second step; FC2 of layer 1 sleeps."""
    steps = Steps(replace(MODEL, micro_batches=1), keeps=keeps)
    steps()
    waited: list[float] = []
    (dense,) = steps.ddp.bucket_groups
    start_sync = dense.start_grad_sync

    def delayed(*args: Any, **kwargs: Any) -> None:
        start_sync(*args, **kwargs)
        dense.grad_reduce_handle = _Delayed(dense.grad_reduce_handle, waited)

    dense.start_grad_sync = delayed
    submit = steps.scheduler.submit
    slow = lambda task: replace(task, run=lambda: (time.sleep(DW_MS / 1e3), task.run())[1])
    steps.scheduler.submit = lambda task: submit(slow(task) if task.name == "layer 1 fc2" else task)
    with planted_time():
        steps()
    (milliseconds,) = waited
    return milliseconds


@pytest.mark.host  # the delay is planted on the host
@pytest.mark.parametrize(("keeps", "waits"), [(True, 0.0), (False, REDUCTION_MS)], ids=["kept", "left"])
def test_the_last_reduction_hides_behind_fc2(keeps: bool, waits: float, run_ranks: Ranks) -> None:
    for milliseconds in run_ranks(2, planted_wait, keeps, sizes=EP_2):
        assert milliseconds == pytest.approx(waits)
