"""A complete small trainer on megatron-core: presets, data, loop, checkpoints, faults."""
