"""Causal depthwise convolution, the short filter in front of a state-space model."""

from pallas_kernels.causal_conv1d.api import causal_conv1d, causal_conv1d_step

__all__ = ["causal_conv1d", "causal_conv1d_step"]
