"""Comparison of generators: same cells, same genes, same requested labels, same training time, same evaluation."""
