"""Tensors between files and memory, one at a time: safetensors, ZeRO partitions, 4-bit layers."""
