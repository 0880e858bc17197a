"""Comparison of synthetic cells from any generator with real cells. Depends on no model."""
