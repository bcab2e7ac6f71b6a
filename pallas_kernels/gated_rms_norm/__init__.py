"""The norm of Mamba-2: RMSNorm, over groups of heads, of what a gate lets through."""

from pallas_kernels.gated_rms_norm.api import gated_rms_norm

__all__ = ["gated_rms_norm"]
