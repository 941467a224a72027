"""The local experts of a rank as grouped matmuls: FC1, activation times probability, FC2.

Weights have the layout of Megatron-Core's legacy GroupedMLP, ``weight1 [H, L*2F]`` and ``weight2 [L*F, H]``, whose
storage is ``[L, H, 2F]`` and ``[L, F, H]``. L local experts, F ffn of this rank, H hidden, R rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import _initialize_affine_weight_gpu
from megatron.core.tensor_parallel.utils import divide
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.parameter import Parameter

from fluid_npu.device.kernels.activations import ActivationProbs
from fluid_npu.device.kernels.groups import DeviceRows, GroupRows, Groups
from fluid_npu.mcore.expert_checkpoint import expert_sharded_state_dict, forget_extra_state
from fluid_npu.mcore.late import LateWeights
from fluid_npu.mcore.lines.activations import megatron_form
from fluid_npu.mcore.lines.groups import ProcessGroups, default_groups
from fluid_npu.ops.expert_mlp import ExpertMLP, WeightGradTarget, expert_mlp
from fluid_npu.schedule.deferred import DeferredWeight, DeferredWeights
from fluid_npu.schedule.scheduler import BackwardScheduler


class FluidGroupedMLP(LateWeights, MegatronModule):
    """Experts of one rank; takes the place of SequentialMLP and of the legacy GroupedMLP.

    fp32, bf16 and fp16; gradients go into ``main_grad`` when ``gradient_accumulation_fusion`` is set, or
    ``fuse_dw`` later.

    Raises:
        ValueError: biases, or an activation that is not element-wise, are configured.
    """

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        submodules: Any = None,
        pg_collection: ProcessGroups | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(config=config)
        _refuse_unsupported(config)
        pg_collection = pg_collection if pg_collection is not None else default_groups()
        self.num_local_experts = num_local_experts
        self.fuse_dw: bool = config.gradient_accumulation_fusion
        self.ep_group, self.tp_group, self.dp_group = pg_collection.ep, pg_collection.expt_tp, pg_collection.expt_dp
        ffn = divide(config.moe_ffn_hidden_size, self.tp_group.size())
        fc1_out = ffn * (2 if config.gated_linear_unit else 1)
        self.fc1_view = (num_local_experts, config.hidden_size, fc1_out)
        self.fc2_view = (num_local_experts, ffn, config.hidden_size)
        self.weight1 = self._parameter((config.hidden_size, num_local_experts * fc1_out), config.init_method, 1)
        self.weight2 = self._parameter(
            (num_local_experts * ffn, config.hidden_size), config.output_layer_init_method, 0
        )
        self.activation_recompute = config.recompute_granularity == "selective" and "moe_act" in (
            config.recompute_modules or []
        )
        gated, function = config.gated_linear_unit, config.activation_func
        self._activation: ActivationProbs | None = None
        if not (gated and function is F.silu):
            self._activation = ActivationProbs(function=function, gated=gated, known_as=megatron_form(function))
        self.register_load_state_dict_post_hook(forget_extra_state)

    def _parameter(self, shape: tuple[int, int], init: Callable[[Tensor], Any], partition_dim: int) -> Parameter:
        config = self.config
        # Always the tracker's way: use_cpu_initialization would start every expert-parallel rank with the same experts.
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        weight = Parameter(torch.empty(shape, device=device, dtype=config.params_dtype))
        if config.perform_initialization:
            _initialize_affine_weight_gpu(weight, init, partition_dim=partition_dim, is_expert=True)
        # Megatron's DDP and optimizer reduce expert weights over the expert-data-parallel group.
        weight.allreduce = config.expert_model_parallel_size <= 1  # type: ignore[attr-defined]
        return weight

    def forward(
        self,
        permuted_local_hidden_states: Tensor,
        tokens_per_expert: Tensor | Groups,
        permuted_probs: Tensor,
        *,
        deferred: DeferredWeights | None = None,
    ) -> tuple[Tensor, None]:
        """``([R, H], None)`` for ``[R, H]`` rows by local expert, the rows of each expert, and ``[R]`` probabilities.

        ``deferred`` takes the weight gradients (see ``defer``); without it they are computed with the input
        gradients.
        """
        x, p = permuted_local_hidden_states, permuted_probs
        if self.config.moe_apply_probs_on_input:
            x, p = (x * p.unsqueeze(-1)).to(x.dtype), torch.ones_like(p)
        mlp = replace(
            self.chunk(_group_rows(tokens_per_expert)), fc1=self._target(0, deferred), fc2=self._target(1, deferred)
        )
        return expert_mlp(x, p, self.weight1.view(self.fc1_view), self.weight2.view(self.fc2_view), mlp), None

    def chunk(self, counts: Groups) -> ExpertMLP:
        """What some consecutive experts compute, without a place for their weight gradients."""
        return ExpertMLP(counts=counts, activation=self._activation, recompute=self.activation_recompute)

    def constants(self) -> tuple[Tensor, Tensor]:
        """The weights of FC1 ``[L, H, 2F]`` and FC2 ``[L, F, H]`` without their gradients."""
        return self.weight1.view(self.fc1_view).detach(), self.weight2.view(self.fc2_view).detach()

    def _target(self, index: int, deferred: DeferredWeights | None) -> WeightGradTarget:
        """Where the gradient of FC1's or FC2's weight goes."""
        if deferred is not None:
            return WeightGradTarget(defer=deferred.dw_of(index))
        parameter = self._weight(index).parameter
        fuse = self.fuse_dw and hasattr(parameter, "main_grad")
        return WeightGradTarget(fuse_into=parameter if fuse else None)

    def _weight(self, index: int) -> DeferredWeight:
        parameter, view = ((self.weight1, self.fc1_view), (self.weight2, self.fc2_view))[index]
        hooks = self.late_hooks(parameter)
        return DeferredWeight(name=f"fc{index + 1}", parameter=parameter, view=view, late_hooks=hooks)

    def defer(
        self,
        scheduler: BackwardScheduler,
        label: str,
        carry: bool | Callable[[], bool] = True,
        placeholders: bool = True,
    ) -> DeferredWeights:
        """What takes this forward's weight gradients: tasks of ``scheduler``, delivered by the dispatch's launch.

        Without ``carry``, a value or what gives one in the backward, no task waits for another layer; without
        ``placeholders`` autograd gets none for a gradient in ``main_grad``, because another use of the weights in the
        same backward gives one.
        """
        weights = [self._weight(0), self._weight(1)]
        return DeferredWeights(weights, scheduler, label, self.fuse_dw, carry, placeholders)

    def backward_dw(self) -> None:
        """Nothing: weight gradients have landed when ``backward()`` returns."""

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """The checkpoint form of SequentialMLP and of the legacy GroupedMLP, in both directions."""
        return expert_sharded_state_dict(self, prefix, sharded_offsets, metadata)


#: Options that change the experts' arithmetic and their value without effect; not every line has each of them.
_PLAIN = {
    "add_bias_linear": (False, "grouped experts have no biases; set --disable-bias-linear"),
    "activation_func_clamp_value": (None, "grouped experts do not clamp their activation"),
    "glu_linear_offset": (0.0, "grouped experts add no offset to the gated unit"),
    "moe_mlp_glu_interleave_size": (None, "grouped experts keep gate and value rows apart"),
}


def _group_rows(given: Tensor | Groups) -> GroupRows | DeviceRows:
    if isinstance(given, GroupRows | DeviceRows):
        return given
    return GroupRows(given.tolist(), given) if isinstance(given, Tensor) else GroupRows(given)


def _refuse_unsupported(config: TransformerConfig) -> None:
    for option, (plain, why) in _PLAIN.items():
        value = getattr(config, option, plain)
        if value != plain:
            raise ValueError(f"{option}={value!r}: {why}; unset it or use Megatron's own experts")
