"""Cells in and out: AnnData, its labels, values and genes."""
