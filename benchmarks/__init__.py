"""Measurements of speed: of operators, and of whole models."""

OPERATOR_NAMES = ("selective_scan", "ssd", "trapezoidal_ssd", "causal_conv1d", "gated_rms_norm")
SUITES = ("shapes", "length", "state")
"""Shapes the project is judged by; a sweep over length, with attention beside; a sweep over the state's size."""
