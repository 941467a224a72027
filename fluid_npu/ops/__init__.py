"""Differentiable operators, one per file; hardware is chosen in ``fluid_npu.device`` only."""
