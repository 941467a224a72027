"""One converted checkpoint trained under different pipelines, by Megatron's own schedules; losses and gradients.

The checkpoint is what a stock model without a pipeline (SequentialMLP) was initialised with, by global names. Its
router keeps experts 4 to 7 of layer 2, and 0 to 3 of layer 3, from ever being chosen: with EP 2 a rank gets no token
there. All other layers are uneven.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from tests.support.device import here, host
from tests.support.gpt import BATCH, SEQUENCE, VOCAB, batch, make_config
from tests.support.gpt import Run as GptRun

LAYERS, EXPERTS = 4, 8
#: Sigmoid scores with a bias per expert: the bias decides who is chosen, and is part of the checkpoint.
ROUTER: dict[str, Any] = {
    "num_layers": LAYERS,
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_router_bias_update_rate": 0.0,
}


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run. ``impl`` is stock, off, dw or twin; ``samples`` are micro-batches of all data ranks.

    ``align`` reduces gradients when the schedule says so, as Megatron-LM does by default, else as they get ready.
    """

    impl: str = "dw"
    pp: int = 1
    vpp: int = 1
    ep: int = 2
    steps: int = 20
    samples: int = 4
    carry_over: bool = False
    block: bool = False
    tied: bool = False
    align: bool = True
    config: dict[str, Any] = field(default_factory=dict)
    ddp: dict[str, Any] = field(default_factory=dict)


def train_all(runs: list[Run], weights: dict[str, torch.Tensor] | None = None) -> list[dict[str, Any]]:
    """Several runs one after the other in the same processes; each result holds the checkpoint it started from."""
    results = []
    for run in runs:
        set_pipeline(run)
        results.append(train(run, weights if weights is not None else checkpoint(run)))
    return results


def set_pipeline(run: Run) -> None:
    """Megatron's process groups of a run."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    parallel_state.destroy_model_parallel()
    parallel_state._POSITION_EMBEDDING_GLOBAL_RANKS = None  # 0.12 forgets these, and keeps those of PP 1
    parallel_state.initialize_model_parallel(
        pipeline_model_parallel_size=run.pp,
        virtual_pipeline_model_parallel_size=run.vpp if run.vpp > 1 else None,
        expert_model_parallel_size=run.ep,
    )
    torch.manual_seed(7)  # a router is initialised on the host, whatever the device
    model_parallel_cuda_manual_seed(7)


def checkpoint(run: Run) -> dict[str, torch.Tensor]:
    """The weights of a freshly initialised stock model without a pipeline, gathered from the ranks of its experts."""
    import torch.distributed as dist

    from fluid_npu.mcore.convert import weights_by_name

    assert run.pp == 1
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, host(weights_by_name(make_chunks(replace(run, impl="stock"))[1])))
    weights = {name: value for mine in reversed(found) for name, value in mine.items()}
    for name, value in weights.items():
        if name.endswith("expert_bias"):
            value.zero_()
    for layer, closed in ((1, slice(EXPERTS // 2, EXPERTS)), (2, slice(0, EXPERTS // 2))):
        weights[f"decoder.layers.{layer}.mlp.router.expert_bias"][closed] = -100.0
    return weights


def make_chunks(run: Run) -> tuple[Any, list[Any]]:
    """This rank's configuration and model chunks."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel

    interleaved = {"virtual_pipeline_model_parallel_size": run.vpp} if run.vpp > 1 else {}
    # Megatron asks for this with PP 2: otherwise activations and gradients go between the same two ranks unordered.
    p2p = {"overlap_p2p_comm": True, "batch_p2p_comm": False} if run.vpp > 1 else {}
    sizes = {"pipeline_model_parallel_size": run.pp, "pipeline_dtype": torch.float32, **interleaved, **p2p}
    config = make_config(GptRun(ep=run.ep, config={**ROUTER, **sizes, **run.config}))
    rank, chunks = parallel_state.get_pipeline_model_parallel_rank(), []
    make_spec = spec_maker(run, config)
    for stage in range(run.vpp):
        vp_stage = announce_stage(stage) if run.vpp > 1 else {}
        chunks.append(
            here(
                GPTModel(
                    config,
                    make_spec(**vp_stage),
                    vocab_size=VOCAB,
                    max_sequence_length=SEQUENCE,
                    pre_process=rank == 0 and stage == 0,
                    post_process=rank == run.pp - 1 and stage == run.vpp - 1,
                    position_embedding_type="rope",
                    share_embeddings_and_output_weights=run.tied,
                    **vp_stage,
                )
            )
        )
    return config, chunks


def announce_stage(stage: int) -> dict[str, int]:
    """How Megatron learns which chunk is built: an argument, in 0.12 a global."""
    import inspect

    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel

    if "vp_stage" in inspect.signature(GPTModel.__init__).parameters:
        return {"vp_stage": stage}
    parallel_state.set_virtual_pipeline_model_parallel_rank(stage)
    return {}


def spec_maker(run: Run, config: Any) -> Callable[..., Any]:
    """Makes the spec of a chunk; chunks of one model share a scheduler."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    from fluid_npu.mcore.binding import SchedulerBinder
    from fluid_npu.mcore.layer_spec import get_fluid_moe_block_spec, get_fluid_moe_layer_spec

    if run.impl == "stock":
        config.moe_grouped_gemm = False
        return partial(get_gpt_decoder_block_spec, config, False, normalization=config.normalization)
    overlap = "off" if run.impl == "off" else "dw"
    if run.block:
        return partial(get_fluid_moe_block_spec, config, binder=SchedulerBinder(overlap, carry_over=run.carry_over))
    spec = get_fluid_moe_layer_spec(config, overlap=overlap, carry_over=run.carry_over)
    return lambda **_: spec


def train(run: Run, weights: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Trains from the checkpoint; the mean loss of each step, gradients of the first step, weights at the end."""
    import contextlib

    import megatron.core
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from fluid_npu.mcore.convert import gradients_by_name, load_weights, weights_by_name
    from fluid_npu.schedule.live import get_backward_scheduler

    config, chunks = make_chunks(run)
    load_weights(weights, chunks)
    settings = DistributedDataParallelConfig(**{"grad_reduce_in_fp32": True, **ddp_settings(run)})
    ddps = [DistributedDataParallel(config, settings, chunk) for chunk in chunks]
    optimizer = get_megatron_optimizer(
        OptimizerConfig(optimizer="adam", lr=5e-3, weight_decay=0.0, clip_grad=1.0), ddps
    )
    config.finalize_model_grads_func = finalize_model_grads
    config.grad_scale_func = optimizer.scale_loss
    if settings.overlap_grad_reduce:
        no_sync, sync = [ddp.no_sync for ddp in ddps], [ddp.start_grad_sync for ddp in ddps]
        config.no_sync_func = no_sync if run.vpp > 1 else no_sync[0]
        if run.pp > 1 and run.align:
            config.grad_sync_func = sync if run.vpp > 1 else sync[0]
    scheduler = None if run.impl == "stock" else get_backward_scheduler(ddps)
    if scheduler is not None:
        scheduler.recorder.enabled = True
    routed = Routed(chunks)
    losses, grads = [], {}
    for step in range(run.steps):
        for ddp in ddps:
            ddp.zero_grad_buffer()
        optimizer.zero_grad()
        with scheduler.serialise() if run.impl == "twin" else contextlib.nullcontext():
            outputs = get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=[batches(run, step) for _ in ddps] if run.vpp > 1 else batches(run, step),
                model=ddps if run.vpp > 1 else ddps[0],
                num_microbatches=micro_batches(run),
                seq_length=SEQUENCE,
                micro_batch_size=BATCH,
                forward_only=False,
            )
        assert scheduler is None or scheduler.pending == 0, "dW left over when the schedule returned"
        if step == 0:
            grads = {name: grad.clone() for name, grad in gradients_by_name(ddps).items()}
        assert optimizer.step()[0]
        losses.append(mean_loss(outputs))
        routed.end_step()
    return {
        "megatron": megatron.core.__version__,
        "impl": run.impl,
        "losses": losses,
        "routed": routed.steps,
        "grads": grads,
        "weights": {name: value.clone() for name, value in weights_by_name(ddps).items()},
        "start": weights,
        "regions": {r.name: r.detail["region"] for r in scheduler.recorder.take() if r.kind == "dw"}
        if scheduler
        else {},
        "stats": scheduler.get_stats() if scheduler else {},
    }


class Routed:
    """How many tokens each layer sent to each of its experts in each step, over all ranks and micro-batches."""

    def __init__(self, chunks: list[Any]) -> None:
        self.steps: list[dict[int, list[int]]] = []
        self._counts: dict[int, torch.Tensor] = {}
        from megatron.core.transformer.moe.router import TopKRouter

        for module in (module for chunk in chunks for module in chunk.modules() if isinstance(module, TopKRouter)):
            module.register_forward_hook(self._count)

    def _count(self, router: Any, inputs: Any, output: tuple[torch.Tensor, torch.Tensor]) -> None:
        if torch.is_grad_enabled():  # recomputation runs a forward twice, the first time without
            counts = output[1].sum(0).cpu()
            self._counts[router.layer_number] = self._counts.get(router.layer_number, 0) + counts

    def end_step(self) -> None:
        """Collective."""
        import torch.distributed as dist

        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, self._counts)
        layers = sorted({layer for mine in found for layer in mine})
        self.steps.append({layer: sum(mine[layer] for mine in found if layer in mine).tolist() for layer in layers})
        self._counts = {}


def same_routing(one: dict[str, Any], other: dict[str, Any]) -> tuple[int, int]:
    """(In how many first steps of two runs every layer sent as many tokens to each expert; tokens of the first layer
    after them that went elsewhere, at least). From there on the two are different models: a choice has no gradient."""
    for step, (mine, theirs) in enumerate(zip(one["routed"], other["routed"], strict=True)):
        assert mine.keys() == theirs.keys() and len(mine) > 0
        for layer in mine:
            apart = sum(abs(a - b) for a, b in zip(mine[layer], theirs[layer], strict=True))
            if apart:
                return step, apart // 2
    return len(one["routed"]), 0


def ddp_settings(run: Run) -> dict[str, Any]:
    """Those of the run that the installed DDP has: 0.12's takes no late gradients, and nothing is carried over."""
    from dataclasses import fields

    from megatron.core.distributed import DistributedDataParallelConfig

    known = {item.name for item in fields(DistributedDataParallelConfig)}
    return {name: value for name, value in run.ddp.items() if name in known}


def micro_batches(run: Run) -> int:
    """Of one data-parallel rank and step."""
    from megatron.core import parallel_state

    return run.samples // parallel_state.get_data_parallel_world_size()


def batches(run: Run, step: int) -> Iterator[dict[str, torch.Tensor]]:
    """This data rank's micro-batches: all runs see the same ones in a step, whatever their data-parallel size."""
    from megatron.core import parallel_state

    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    return (batch(1, step % 2, micro) for micro in range(rank, run.samples, size))


def forward_step(data: Iterator[dict[str, torch.Tensor]], model: Any) -> tuple[torch.Tensor, Any]:
    """Megatron's ``forward_step_func``."""
    return model(**next(data)), partial(_loss)


def _loss(losses_BS: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    mean = losses_BS.float().mean()
    return mean, {"loss": mean.detach().clone()}


def mean_loss(outputs: list[dict[str, torch.Tensor]]) -> float:
    """Mean over micro-batches and data ranks, on every rank."""
    import torch.distributed as dist

    total = here(torch.tensor([sum(float(one["loss"]) for one in outputs), float(len(outputs))]))
    dist.all_reduce(total)
    return float(total[0] / total[1])


def whole(results: list[dict[str, Any]], key: str) -> dict[str, torch.Tensor]:
    """Tensors of all ranks under their global names."""
    return {name: value for result in reversed(results) for name, value in result[key].items()}
