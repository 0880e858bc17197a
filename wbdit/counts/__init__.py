"""Counts, not rounded values: bins, likelihood, denoiser."""
