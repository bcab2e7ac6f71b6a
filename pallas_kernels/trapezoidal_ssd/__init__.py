"""SSD with the exponential-trapezoidal rule and a rotating state, the operator of Mamba-3."""

from pallas_kernels.trapezoidal_ssd.api import trapezoidal_ssd, trapezoidal_ssd_recurrence, trapezoidal_ssd_step
from pallas_kernels.trapezoidal_ssd.inputs import State

__all__ = ["State", "trapezoidal_ssd", "trapezoidal_ssd_recurrence", "trapezoidal_ssd_step"]
