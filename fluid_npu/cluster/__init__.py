"""Checks a Megatron-LM job for a cluster before any node starts: flags, sizes, memory, files, environment.

Standard library only. ``scripts/pretrain_*.sh`` call it through ``fluid-npu cluster``; docs/CLUSTERS.md is its manual.
"""
