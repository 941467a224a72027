"""The training loop of one rank: build, restore, step, save, summarise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fluid_npu.device import Choice
from fluid_npu.report.loss_plot import plot_loss
from fluid_npu.schedule.hidden import OverlapStats, is_twin
from fluid_npu.train import checkpoint
from fluid_npu.train.attention_plan import settle_attention
from fluid_npu.train.config import ConfigError, TrainConfig
from fluid_npu.train.data.build import info, load_tokenizer
from fluid_npu.train.data.dataset import BatchIterator, build_datasets
from fluid_npu.train.generate import generate
from fluid_npu.train.metrics import MetricsWriter, read_metrics
from fluid_npu.train.model import build_chunks, build_model_config, moe_layers
from fluid_npu.train.optimizer import adam_in_use, build_optimizer, build_scheduler
from fluid_npu.train.overlap import as_dict, settle
from fluid_npu.train.parallel import Place
from fluid_npu.train.pipeline import forward_logits
from fluid_npu.train.progress_bar import Progress
from fluid_npu.train.step import TrainStep, wrap_ddp
from fluid_npu.train.summary import step_figures, versions, write_summary
from fluid_npu.train.trace import StepTrace

PROMPT = "def "
_WARM_UP = 3  # steps that are left out of the overlap's medians


class Run:
    """Everything of one rank, built from the configuration. Building is collective."""

    def __init__(self, config: TrainConfig, place: Place) -> None:
        self.place = place
        self.preset = config.model()
        self.dtype = config.dtype or _default_dtype(place)
        self.overlap: Choice[str]
        settled, self.overlap = settle(replace(config, dtype=self.dtype), place)
        self.overlap.announce("overlap")
        self.config = config = settle_attention(settled, self.overlap.value, place)
        self.optimizer_kind = adam_in_use().announce("Adam")
        self.model_config = build_model_config(config, self.dtype)
        self.chunks = build_chunks(config, self.model_config, self.overlap.value)
        for chunk in self.chunks:
            chunk.to(place.device.torch_device(place.local_rank))
        self.backward_scheduler = _backward_scheduler(config, self.chunks, self.overlap.value)
        self.ddps = [wrap_ddp(config, self.model_config, chunk) for chunk in self.chunks]
        self.optimizer = build_optimizer(config, self.ddps, self.dtype)
        self.schedule = build_scheduler(config, self.optimizer)
        self.state = checkpoint.RunState(chunks=self.chunks, optimizer=self.optimizer, scheduler=self.schedule)
        self.step = TrainStep(
            config, place, self.model_config, self.ddps, self.optimizer, self.schedule, self.backward_scheduler
        )
        self.stats = OverlapStats()

    @property
    def tokens_per_step(self) -> int:
        """Of all data-parallel ranks together."""
        samples = self.preset.micro_batch_size * self.config.micro_batches * self.place.dp_size
        return samples * self.preset.seq_length


def train(config: TrainConfig, place: Place) -> dict[str, Any]:
    """Trains to ``config.steps`` and returns the summary (on every rank; rank 0 has written it)."""
    run = Run(config, place)
    start = checkpoint.restore(config, place, run.state) if config.resume else 0
    if config.resume and place.first:
        print(f"resuming after step {start}" if start else "no complete checkpoint: starting at step 1", flush=True)
    batches = _batches(run, start)
    _train_steps(run, batches, start)
    return _summarise(run)


def _train_steps(run: Run, batches: BatchIterator, start: int) -> None:
    config, place = run.config, run.place
    progress = Progress(config.steps, start, enabled=place.first)
    metrics = MetricsWriter(config.out, start) if place.first else None
    trace = StepTrace(config, run.overlap.value, start)
    try:
        for step in range(start + 1, config.steps + 1):
            result = run.step(batches, twin=is_twin(step, run.overlap.value, config.twin_every), traced=step in trace)
            if result.spans is not None:
                trace.add(step, place.rank, result.spans)
            tokens_per_s = run.tokens_per_step / result.step_ms * 1e3
            if step > start + _WARM_UP:
                run.stats.add(result.step_ms, result.coverage)
            if metrics is not None:
                metrics.write(step, result, tokens_per_s)
            progress.show(step, result, tokens_per_s)
            if step % config.checkpoint_every == 0 or step == config.steps:
                checkpoint.save(config, place, run.state, step)
        trace.write(config.out, place)
    finally:
        progress.close()
        if metrics is not None:
            metrics.close()


def _summarise(run: Run) -> dict[str, Any]:
    config, place = run.config, run.place
    generated = _generate(run)
    peak = torch.tensor([place.device.peak_memory_mb()], device=place.device.torch_device(place.local_rank))
    with place.phase("summary"):
        dist.all_reduce(peak, op=dist.ReduceOp.MAX)
    if not place.first:
        return {}
    rows = read_metrics(config.out)
    entropy = info(_data(config), checksum=False).unigram_entropy
    summary = {
        **step_figures(rows, run.tokens_per_step),
        **run.stats.report(run.overlap.value),
        "peak_memory_mb": float(peak),
        "unigram_entropy": entropy,
        "overlap": as_dict(run.overlap),
        "adam": run.optimizer_kind.value,
        "a2a_payload": _payload(run),
        "generated": generated,
        "device": f"{place.device.name}: {place.device.describe()}",
        "dtype": run.dtype,
        "preset": run.preset.name,
        "parallel": {name: getattr(config, name) for name in ("nproc", "ep", "tp", "pp", "vpp", "cp")},
        "versions": versions(),
        "out": config.out,
    }
    problem = plot_loss(
        [row["step"] for row in rows], [row["loss"] for row in rows], Path(config.out) / "loss.png", entropy
    )
    if problem:
        print(problem, flush=True)
    write_summary(config.out, summary)
    return summary


def _payload(run: Run) -> dict[str, Any]:
    """How tokens travel in a dispatch, and what that changed in this rank's first one."""
    layers = (layer for chunk in run.chunks for layer in moe_layers(chunk))
    payloads = (getattr(layer.token_dispatcher, "payload", None) for layer in layers)
    error = next((payload.error for payload in payloads if payload is not None), None)
    return {"dtype": run.config.a2a_payload_dtype, **(asdict(error) if error is not None else {})}


def _batches(run: Run, start: int) -> BatchIterator:
    config, place = run.config, run.place
    prefix = _data(config)
    entries = info(prefix, checksum=False).vocab_size
    if entries > run.preset.vocab_size:
        raise ConfigError(
            f"--data {prefix}: its tokenizer has {entries} entries, preset {run.preset.name} has room for "
            f"{run.preset.vocab_size}; use --vocab-size {entries}"
        )
    datasets = build_datasets(prefix, seq_length=run.preset.seq_length, samples=(1, 0, 0), seed=config.seed)
    return BatchIterator(
        datasets.train,
        micro_batch=run.preset.micro_batch_size,
        data_parallel_rank=place.dp_rank,
        data_parallel_size=place.dp_size,
        num_micro_batches=config.micro_batches,
        start_step=start,
        seed=config.seed,
    )


def _generate(run: Run) -> str | None:
    """A few words, by all ranks together; None where the logits are spread over tensor ranks."""
    if run.config.tp > 1:
        return None
    device = run.place.device.torch_device(run.place.local_rank)
    for chunk in run.chunks:
        chunk.eval()
    try:
        with run.place.phase("text generation", watched=False):
            logits = partial(forward_logits, run.chunks, device=device)
            tokenizer = load_tokenizer(_data(run.config))
            return generate(logits, tokenizer, PROMPT, max_new_tokens=24, max_context=run.preset.seq_length)
    finally:
        for chunk in run.chunks:
            chunk.train()


def _backward_scheduler(config: TrainConfig, chunks: Sequence[torch.nn.Module], overlap: str) -> Any | None:
    if config.impl == "stock":
        return None
    from fluid_npu.schedule.live import get_backward_scheduler
    from fluid_npu.schedule.scheduler import BackwardScheduler

    if any(True for chunk in chunks for _ in moe_layers(chunk)) or config.cp > 1:
        return get_backward_scheduler(chunks)
    # A stage of dense layers whose attention exchanges nothing has an idle one: all ranks count and report alike.
    return BackwardScheduler(overlap, carry_over=config.carry_over, name="a stage without MoE layers")


def _default_dtype(place: Place) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[place.device.default_dtype]


def _data(config: TrainConfig) -> str:
    assert config.data is not None  # the launcher has filled it in
    return config.data
