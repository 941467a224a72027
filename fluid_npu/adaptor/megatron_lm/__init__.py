"""Megatron-LM's own ``pretrain_gpt.py`` with our layers: flags, checks, switching on, report, and a CPU to run it on.

Feature ``megatron_lm`` wraps Megatron's parser, its validation and its training loop; what the flags ask for is
switched on between parsing and building the model. Megatron-LM is a checkout, not a package: its version is the one of
the ``megatron.core`` beside it.
"""
