"""Measurements of speed: of operators, and of whole models."""
