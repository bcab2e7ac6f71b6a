"""State-space duality (SSD), the operator of Mamba-2."""

from pallas_kernels.ssd.api import ssd, ssd_step

__all__ = ["ssd", "ssd_step"]
