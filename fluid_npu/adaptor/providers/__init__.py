"""Other packages that patch Megatron: how they are found, and how our patches live beside theirs."""
