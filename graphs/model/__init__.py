"""What the models compute, in PyTorch: attention, rotary embeddings, the module that is traced, the reference."""
