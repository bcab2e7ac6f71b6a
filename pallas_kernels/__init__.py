"""Operators of state-space models: arrays in, arrays out, with kernels for NVIDIA GPUs."""
