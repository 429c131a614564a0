"""The four perceptual axes, in the one order that every array and file of this project uses."""

from typing import Final

AXES: Final = ("CE", "CU", "PC", "PQ")
"""Axis codes in output order, that of the audiobox-aesthetics tool."""

AXIS_NAMES: Final = {
    "CE": "Content Enjoyment",
    "CU": "Content Usefulness",
    "PC": "Production Complexity",
    "PQ": "Production Quality",
}
