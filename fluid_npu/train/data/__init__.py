"""Real text on disk: corpus, tokenizer, Megatron IndexedDataset, deterministic batches."""
