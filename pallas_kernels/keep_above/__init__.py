"""Leaves out what does not exceed a threshold of its channel and its token."""

from pallas_kernels.keep_above.api import keep_above

__all__ = ["keep_above"]
