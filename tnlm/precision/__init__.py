"""Bits: the grids on which weights are rounded, how they are rounded, packed and multiplied."""
