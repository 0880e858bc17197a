"""Data handling: AnnData, its expression values, labels and genes."""
