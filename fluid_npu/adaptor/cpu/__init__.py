"""Replacements that let megatron-core run without CUDA; the rows that use them are in ``patches/``."""
