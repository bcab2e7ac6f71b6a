"""Kinds of arguments that several commands take."""

from __future__ import annotations

import argparse


def count(text: str) -> int:
    """A whole number above 0, K for 1,024 and M for 1,048,576."""
    units = {"K": 1 << 10, "M": 1 << 20}
    digits, unit = (text[:-1], units[text[-1].upper()]) if text[-1:].upper() in units else (text, 1)
    try:
        number = int(digits) * unit
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of 1 or more, such as 2048, 2K or 1M")
    return number
