"""Selective scan (S6), the operator of Mamba-1."""

from pallas_kernels.selective_scan.api import selective_scan, selective_scan_step

__all__ = ["selective_scan", "selective_scan_step"]
