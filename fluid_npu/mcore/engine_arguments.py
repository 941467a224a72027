"""What can be said to the engine of a model: the arguments that Layer Specs take and hand to ``SchedulerBinder``."""

from __future__ import annotations

from typing import TypedDict

from fluid_npu.comm.transports import Transport


class EngineArguments(TypedDict, total=False):
    """All optional; defaults are those of ``SchedulerBinder``, which refuses wrong values (ValueError)."""

    overlap: str
    """'dw' (default) runs weight gradients beside the backward's AllToAlls; 'full' also runs each MoE layer in chunks
    of its experts, beside whose AllToAlls the other chunks compute; 'off' overlaps nothing."""
    carry_over: bool
    """Weight gradients may run beside the combine of the layer below: those of attention's linears, of dense layers
    and shared experts, which become Fluid linears (local backend), and with a DDP that has ``delay_wgrad_compute``
    those of FC2 and the router."""
    transport: Transport | None
    """Moves the bytes; None takes torch.distributed's collective."""
    gemm_fusion: bool
    """The experts' weight gradients go straight into ``main_grad``, whatever the configuration says."""
    dispatch: str
    """'plain' (default) sends a token once for each of its experts, 'once-per-rank' once to each rank that holds
    some, 'once-per-node' once to each node and inside it once to each rank, 'static' once to every rank, 'auto' what
    has clearly fewer rows."""
    node_size: int
    """Ranks of the job on each node, for dispatch='once-per-node' and 'auto', the same on all ranks; 0 takes those of
    a two-level transport."""
    payload_dtype: str
    """'fp8' sends the tokens of a dispatch as e4m3 with a scale a token (``ops.payload_fp8``); combine and gradients
    keep their dtype. 'same' (default) changes nothing."""
    chunks: int | str
    """With overlap='full', the number of chunks: a divisor of the experts of a rank, with chunks of tokens any number,
    or 'auto'."""
    chunks_of: str
    """With dispatch='once-per-rank', whether chunks are of 'tokens' or of 'experts' (``mcore.chunk_cuts``); 'auto'
    (default) takes experts where that sends hardly more rows."""
    local_first: bool
    """With overlap='full', rows that stay on their rank are a chunk before the others, computed while the first of
    those travels (``schedule.pipeline``); their dW joins the rows of all chunks."""
    attention_chunks: int | str
    """Parts in which each rank's heads are computed under context parallelism, each part's AllToAlls beside the
    computation of others (``FluidSelfAttention``); 'auto': with overlap='full' the fewest that overlap, else 1."""
    interleave_batches: bool
    """Layers with experts train in two halves of a micro-batch, the AllToAlls of each beside the computation of the
    other (``mcore.interleave``): as two micro-batches of half the size."""
    cuda_graph: bool | str
    """Each MoE layer's forward and backward are recorded after a few calls and replayed by one call of the host each;
    CUDA and dispatch='static' alone. True refuses a layer of which that cannot be, 'auto' leaves it as it is and says
    why."""
