"""The transport that the settings in force ask for, chosen when the first spec is made.

Every rank of a job makes its specs, whatever layers it then builds, so all of them are there for the choice.
"""

from __future__ import annotations

from megatron.core import parallel_state

from fluid_npu.adaptor.settings import Settings
from fluid_npu.comm.transports import Transport
from fluid_npu.comm.transports.choose import choose_transport
from fluid_npu.comm.transports.nodes import agreed_node_size
from fluid_npu.device import get_device


def transport_of(settings: Settings) -> Transport | None:
    """None for torch.distributed's collective; anything else is a collective call over the job.

    Raises RuntimeError before Megatron's process groups exist, else as ``choose_transport``.
    """
    if settings.a2a_transport == "collective":
        return None
    _need_groups(f"a2a_transport={settings.a2a_transport!r}")
    groups = [parallel_state.get_expert_model_parallel_group(), parallel_state.get_context_parallel_group()]
    chosen: Transport = choose_transport(
        settings.a2a_transport,
        groups,
        get_device(settings.device).value,
        bytes_to_peers=settings.a2a_bytes,
        node_size=settings.a2a_node_size,
        ctas=settings.a2a_ctas,
    ).value
    return chosen


def node_size_of(settings: Settings) -> int:
    """Ranks of a node for a dispatch by nodes; 0 where the transport alone may know. For 'once-per-node' collective.

    Raises RuntimeError before Megatron's process groups exist, ValueError where the ranks do not agree.
    """
    if settings.dispatch != "once-per-node":
        return settings.a2a_node_size if settings.dispatch == "auto" else 0
    _need_groups(f"dispatch={settings.dispatch!r}")
    return agreed_node_size(settings.a2a_node_size).value


def _need_groups(setting: str) -> None:
    if not parallel_state.model_parallel_is_initialized():
        raise RuntimeError(
            f"{setting} is chosen with the process groups of the job: call "
            "parallel_state.initialize_model_parallel() before a layer's spec is made"
        )
