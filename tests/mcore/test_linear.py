"""Fluid linears: alone, in dense models and in MoE models with carry-over, against float64 on one process.

Largest relative Frobenius error of a gradient: 1e-5 in fp32. The serialised twin, overlap off and, on a CPU, stock
Megatron are equal bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.support.device import NAME, here
from tests.support.gpt import Run, same_bits, shard
from tests.support.linears import (
    Case,
    Model,
    all_gradients,
    gradients,
    inputs,
    pair,
    pair_errors,
    reference,
    run_pairs,
)
from tests.support.moe import relative

TOLERANCE = 1e-5
Ranks = Callable[..., list[Any]]


@pytest.mark.parametrize(
    ("tp", "sequence_parallel"), [(1, False), (2, False), (2, True)], ids=["tp1", "tp2", "tp2_sequence_parallel"]
)
def test_alone_they_equal_float64_their_twin_and_stock(tp: int, sequence_parallel: bool, run_ranks: Ranks) -> None:
    base = Case(tp=tp, sequence_parallel=sequence_parallel)
    one, plain = replace(base, micro_batches=1), replace(base, fuse=False)
    cases = [base, replace(base, twin=True), replace(base, queued=False), replace(base, impl="stock")]
    cases += [plain, replace(plain, impl="stock"), replace(base, bias=False), one]
    ranks = run_ranks(tp, run_pairs, cases, sizes={"tensor_model_parallel_size": tp})
    for index, case in enumerate(cases):
        errors = pair_errors(case, [run[index] for run in ranks])
        assert max(errors.values()) <= TOLERANCE, (case, errors)
    for queued, twin, alone, stock, unfused, unfused_stock, *_ in ranks:
        pairs = [(queued, twin), (queued, alone)]
        pairs += [(queued, stock), (unfused, unfused_stock)] if NAME == "cpu" else []
        for ours, other in pairs:
            assert not same_bits(ours["grads"], other["grads"])
            assert all(torch.equal(*both) for key in ("out", "dx") for both in zip(ours[key], other[key], strict=True))
        assert queued["stats"]["completed_dw_tasks"] == 4 and alone["stats"]["completed_dw_tasks"] == 0
        assert queued["record"] == [*_record_of_a_backward(tp, sequence_parallel)] * 2


def _record_of_a_backward(tp: int, sequence_parallel: bool) -> list[tuple[str, str, Any]]:
    """What the recorder holds of one micro-batch."""
    if tp == 1:
        return [("dw", "fc2", "end of backward"), ("dw", "fc1", "end of backward")]
    name = f"{'reduce-scatter' if sequence_parallel else 'all-reduce'} of dX of fc1"
    gather = [(kind, "all-gather of x of fc1", None) for kind in ("launch", "wait")] if sequence_parallel else []
    inside = [("dw", "fc2", name), ("dw", "fc1", name)]  # the queue and its own dW, while dX is reduced
    return [*gather, *gather, ("launch", name, None), *inside, ("wait", name, None)]


def under_torch_ddp() -> dict[str, Any]:
    """Gradients of queued linears and of stock ones under torch's DDP, whose hooks know nothing of fluid_npu."""
    import torch.distributed as dist

    from fluid_npu.schedule.scheduler import BackwardScheduler

    class Net(torch.nn.Module):
        def __init__(self, layers: torch.nn.ModuleDict) -> None:
            super().__init__()
            self.layers = layers

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.layers["fc2"](torch.nn.functional.gelu(self.layers["fc1"](x)[0]))[0]
            return out

    found = {}
    for impl in ("stock", "fluid"):
        net = Net(pair(Case(impl=impl, fuse=False)))
        if impl == "fluid":
            scheduler = BackwardScheduler()
            for name, layer in net.layers.items():
                layer.join(scheduler, name)
        ddp = torch.nn.parallel.DistributedDataParallel(net, bucket_cap_mb=1)
        for micro in range(2):
            ddp(here(inputs(2 * micro + dist.get_rank())[0])).sum().backward()
        found[impl] = {name: parameter.grad.clone() for name, parameter in net.named_parameters()}
    return found


@pytest.mark.host
def test_a_queued_gradient_reaches_torchs_ddp_too(run_ranks: Ranks) -> None:
    for found in run_ranks(2, under_torch_ddp, sizes={}):
        assert not same_bits(found["fluid"], found["stock"])


# ---- whole models

SMALL_BUCKETS = {"overlap_grad_reduce": True, "bucket_size": 2000}
LATE = {**SMALL_BUCKETS, "delay_wgrad_compute": True}
#: Attention with biases, shared experts, and in the middle a layer without experts.
MOE = {"num_layers": 4, "moe_layer_freq": [1, 0, 1, 1], "moe_shared_expert_intermediate_size": 16, "add_qkv_bias": True}
DENSE = {"num_moe_experts": None, "moe_grouped_gemm": False, "moe_ffn_hidden_size": None, "add_qkv_bias": True}


def check(model: Model, ranks: list[dict[str, Any]], tp: int, run_ranks: Ranks) -> None:
    """Every parameter's gradient and dX of the first layer against float64."""
    (want,) = run_ranks(1, reference, model, len(ranks) // tp, sizes={})
    for rank, run in enumerate(ranks):
        data_rank, tensor_rank = divmod(rank, tp)
        errors = {}
        for name, grad in run["grads"].items():
            whole = want["grads"][name]
            errors[name] = relative(grad, whole if ".experts." in name else shard(name, whole, tensor_rank, tp))
        for micro, (dx, whole) in enumerate(zip(run["dx"], want["dx"][data_rank], strict=True)):
            mine = whole if dx.shape == whole.shape else whole.chunk(tp)[tensor_rank]
            errors[f"dx of micro-batch {micro}"] = relative(dx, mine)
        assert len(errors) > len(run["grads"]) >= 17
        assert max(errors.values()) <= TOLERANCE, {name: e for name, e in errors.items() if e > TOLERANCE}


def check_equal(runs: list[dict[str, Any]]) -> None:
    """The first run has the bits of all others."""
    first, *others = runs
    for other in others:
        assert not same_bits(first["grads"], other["grads"])
        assert all(torch.equal(a, b) for a, b in zip(first["dx"], other["dx"], strict=True))


@pytest.mark.parametrize("micro_batches", [pytest.param(1, marks=pytest.mark.nightly), 2])
@pytest.mark.parametrize("load", ["even", "zero_token_rank"])
def test_a_moe_model_with_carry_over(load: str, micro_batches: int, run_ranks: Ranks) -> None:
    """EP 2 on two ranks; with four of eight experts used the second rank gets no token at all."""
    run = Run(micro_batches=micro_batches, steps=2, config=MOE, ddp=LATE, spec={"carry_over": True}, block=True)
    model = Model(run=run, experts_used=4 if load == "zero_token_rank" else 0)
    off = replace(model, run=replace(run, impl="off", ddp=SMALL_BUCKETS))
    plain = replace(off, run=replace(off.run, impl="dw"))  # FC2 stays with its layer, the linears wait all the same
    unfused = replace(model, run=replace(run, config={**MOE, "gradient_accumulation_fusion": False}))
    models = [model, replace(model, run=replace(run, impl="twin")), off, plain, unfused]
    ranks = run_ranks(2, all_gradients, models, sizes={"expert_model_parallel_size": 2})
    check(model, [found[0] for found in ranks], 1, run_ranks)
    for overlapped, twin, serial, unflagged, apart in ranks:
        check_equal([overlapped, twin, *([serial, unflagged] if NAME == "cpu" else [])])
        assert max(relative(apart["grads"][name], grad) for name, grad in overlapped["grads"].items()) <= TOLERANCE
        _check_regions(overlapped["regions"])
        assert (
            unflagged["regions"]["layer 4 self_attention.linear_qkv"] == "backward of moe_combine AllToAll of layer 3"
        )
        assert overlapped["stats"]["queue_peak_tasks"] == 10 and overlapped["stats"]["queue_full"] == 0
    if load == "zero_token_rank":
        assert ranks[1][0]["stats"]["dw_flops"] < ranks[0][0]["stats"]["dw_flops"]


def _check_regions(regions: dict[str, str]) -> None:
    """Above the lowest MoE layer each linear fills the combine of the next MoE layer below, which nothing else does."""
    attention = ("self_attention.linear_qkv", "self_attention.linear_proj")
    for layer, below in ((4, 3), (3, 1)):
        for name in (*attention, "mlp.shared_experts.linear_fc1", "mlp.shared_experts.linear_fc2", "fc2"):
            assert regions[f"layer {layer} {name}"] == f"backward of moe_combine AllToAll of layer {below}"
    for name in (*attention, "mlp.linear_fc1", "mlp.linear_fc2"):
        assert regions[f"layer 2 {name}"] == "backward of moe_combine AllToAll of layer 1"
    for name in attention:
        assert regions[f"layer 1 {name}"] == "at once"


def test_a_moe_model_with_tensor_and_sequence_parallelism(run_ranks: Ranks) -> None:
    """TP 2 and EP 2 on four ranks: qkv runs beside its reduce-scatter, proj fills the combine."""
    sizes = {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2, "expert_tensor_parallel_size": 1}
    run = Run(micro_batches=2, steps=2, config=MOE, ddp=LATE, spec={"carry_over": True}, block=True)
    model = Model(run=run)
    ranks = run_ranks(4, all_gradients, [model, replace(model, run=replace(run, impl="twin"))], sizes=sizes)
    check(model, [found[0] for found in ranks], 2, run_ranks)
    for overlapped, twin in ranks:
        check_equal([overlapped, twin])
        regions = overlapped["regions"]
        qkv, proj = (f"layer 4 self_attention.linear_{part}" for part in ("qkv", "proj"))
        assert regions[qkv] == f"reduce-scatter of dX of {qkv}"
        assert regions[proj] == "backward of moe_combine AllToAll of layer 3"


@pytest.mark.parametrize("tp", [1, 2])
def test_a_dense_model(tp: int, run_ranks: Ranks) -> None:
    """Two ranks, no MoE layer: dW runs at once or beside the tensor-parallel collectives, as of stock Megatron."""
    run = Run(ep=1, micro_batches=2, steps=2, config=DENSE, ddp=SMALL_BUCKETS, spec={"carry_over": True}, block=True)
    model = Model(run=run)
    models = [model, replace(model, run=replace(run, impl="twin"))]
    models.append(
        replace(model, tensor_parallel_alone=True) if tp > 1 else replace(model, run=replace(run, impl="stock"))
    )
    ranks = run_ranks(2, all_gradients, models, sizes={"tensor_model_parallel_size": tp})
    for index in (0, 2):
        check(models[index], [found[index] for found in ranks], tp, run_ranks)
    for overlapped, twin, other in ranks:
        check_equal([overlapped, twin, *([other] if tp == 1 and NAME == "cpu" else [])])
        places = set(overlapped["regions"].values())
        if tp == 1:
            assert places == {"at once"}
        else:
            assert all(place.startswith("reduce-scatter of dX") for place in places)
            assert all(place.startswith("all-reduce of dX") for place in other["regions"].values())


def test_a_bounded_queue_changes_places_not_bits(run_ranks: Ranks) -> None:
    run = Run(micro_batches=2, steps=2, config=MOE, ddp=LATE, spec={"carry_over": True}, block=True)
    for free, bounded in run_ranks(2, with_queue_limits, Model(run=run), sizes={"expert_model_parallel_size": 2}):
        check_equal([free, bounded])
        assert bounded["stats"]["queue_peak_tasks"] == 3
        assert bounded["stats"]["queue_peak_bytes"] < free["stats"]["queue_peak_bytes"]
        assert bounded["stats"]["queue_full"] > 0 and "queue full" in bounded["regions"].values()


def with_queue_limits(model: Model) -> list[dict[str, Any]]:
    """The same model with the default limit and with three tasks."""
    from fluid_npu.schedule import scheduler

    found = [gradients(model)]
    original = scheduler.BackwardScheduler.__init__
    limited = lambda self, *a, **k: original(self, *a, **{**k, "queue_limit": 3})
    scheduler.BackwardScheduler.__init__ = limited  # type: ignore[method-assign]
    return [*found, gradients(model)]


def kinds_of_specs() -> dict[str, Any]:
    """Which classes of linears the specs name, and what is said of those that stay."""
    import contextlib
    import io

    from megatron.core.transformer.transformer_layer import TransformerLayer

    from fluid_npu.mcore.binding import SchedulerBinder
    from fluid_npu.mcore.layer_spec import get_fluid_moe_layer_spec, with_fluid_moe
    from tests.support.gpt import make_config

    class Mine(TransformerLayer):
        pass

    config = make_config(Run())
    name = lambda spec: spec.submodules.self_attention.submodules.linear_qkv.__name__
    found: dict[str, Any] = {
        "default": name(get_fluid_moe_layer_spec(config)),
        "off": name(get_fluid_moe_layer_spec(config, overlap="off", carry_over=True)),
    }
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        found["carried"] = name(get_fluid_moe_layer_spec(config, carry_over=True))
        mine = get_fluid_moe_layer_spec(config)
        mine.module = Mine
        found["mine"] = name(with_fluid_moe(mine, SchedulerBinder(carry_over=True)))
    found["said"] = text.getvalue()
    return found


def test_only_carry_over_takes_the_linears_and_says_so(run_ranks: Ranks) -> None:
    (found,) = run_ranks(1, kinds_of_specs, sizes={})
    assert found["default"] == found["off"] == found["mine"] == "ColumnParallelLinear"
    assert found["carried"] == "FluidColumnParallelLinear"
    assert "linear layers under carry_over: Fluid" in found["said"]
    assert "left as they are (Mine is not Megatron's TransformerLayer)" in found["said"]


def stock_cases() -> dict[str, Any]:
    """Frozen weights, autocast and weights of another module; checkpoints of stock linears."""
    layers = pair(Case(fuse=False))
    stock = pair(Case(fuse=False, impl="stock"))
    x = here(inputs(0)[0])
    found: dict[str, Any] = {"keys": list(layers.state_dict()) == list(stock.state_dict())}
    layers["fc1"].weight.requires_grad_(False)
    layers["fc1"](x.requires_grad_())[0].sum().backward()
    found["frozen"] = layers["fc1"].weight.grad is None and x.grad is not None
    other = torch.nn.Parameter(layers["fc1"].weight.detach().clone())
    layers["fc1"](x, weight=other)[0].sum().backward()
    found["given"] = other.grad is not None and layers["fc1"].weight.grad is None
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        middle, want = layers["fc1"](x)[0], stock["fc1"](x)[0]
    found["autocast"] = torch.equal(middle, want)
    with torch.no_grad():
        found["no_grad"] = torch.equal(layers["fc1"](x)[0], stock["fc1"](x)[0])
    return found


def test_what_megatrons_own_product_must_do(run_ranks: Ranks) -> None:
    (found,) = run_ranks(1, stock_cases, sizes={})
    assert all(found.values()), found
