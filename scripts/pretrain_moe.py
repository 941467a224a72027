"""Trains a small Mixture-of-Experts model on random text with plain torch and Megatron-Core, and Fluid layers in it.

    torchrun --nproc-per-node 2 scripts/pretrain_moe.py [--steps 20] [--overlap off]

Lines marked (*) are all that fluid_npu adds to such a script. On a machine without CUDA one more adapts Megatron to it.
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
import torch.nn.functional as F

import fluid_npu
from fluid_npu.device import get_device


def main() -> None:
    parser = argparse.ArgumentParser(description="A small MoE model on Megatron-Core with its AllToAll hidden.")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--overlap", choices=("dw", "off"), default="dw")
    args = parser.parse_args()

    rank, world, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    device = start_device(local)
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.models.gpt import GPTModel
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer.transformer_config import TransformerConfig

    parallel_state.initialize_model_parallel(expert_model_parallel_size=world)
    torch.manual_seed(1)
    model_parallel_cuda_manual_seed(1)
    config = TransformerConfig(
        num_layers=2,
        hidden_size=64,
        num_attention_heads=4,
        ffn_hidden_size=128,
        num_moe_experts=8,
        moe_router_topk=2,
        moe_token_dispatcher_type="alltoall",
        expert_model_parallel_size=world,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        normalization="RMSNorm",
    )
    spec = fluid_npu.get_fluid_moe_layer_spec(config, overlap=args.overlap)  # (*)
    model = GPTModel(config, spec, vocab_size=256, max_sequence_length=64, position_embedding_type="rope").to(device)
    if rank == 0:
        fluid_npu.print_fluid_layer_info(model)  # (*)
    ddp = DistributedDataParallel(config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), model)
    ddp.broadcast_params()
    optimizer = get_megatron_optimizer(OptimizerConfig(lr=3e-3, clip_grad=1.0), [ddp])

    torch.manual_seed(rank)  # every rank its own text
    for step in range(args.steps):
        tokens, positions, mask = batch(device)
        ddp.zero_grad_buffer()
        loss = ddp(tokens, positions, mask, labels=tokens.roll(-1, 1)).mean()
        loss.backward()  # when it returns, every weight gradient has landed
        finalize_model_grads([ddp])
        optimizer.step()
        if rank == 0:
            print(f"step {step + 1} loss {loss.item():.4f}", flush=True)
    if rank == 0:
        fluid_npu.print_status(model)  # (*)
    dist.destroy_process_group()


def start_device(local_rank: int) -> torch.device:
    """Joins the job: NCCL on GPUs, HCCL on NPUs, gloo on a CPU, to which Megatron must be adapted first."""
    device = get_device().value
    device.set_current(local_rank)
    if device.name == "cpu":
        fluid_npu.adapt(["cpu"])
    dist.init_process_group(device.backend)
    return device.torch_device(local_rank)


def batch(device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Four sequences of counting bytes, their positions, and the causal mask (True hides)."""
    start_B1 = torch.randint(0, 256, (4, 1))
    tokens_BS = (start_B1 + torch.arange(64)).remainder(256).to(device)
    positions_BS = torch.arange(64, device=device).expand(4, 64)
    mask_11SS = torch.ones(1, 1, 64, 64, dtype=torch.bool, device=device).triu_(1)
    return tokens_BS, positions_BS, mask_11SS


if __name__ == "__main__":
    main()
