"""``fluid-npu megatron-lm``: puts the one line into a Megatron-LM checkout, takes it out again, says where it stands.

Standard library only; nothing of the checkout is imported.
"""
