"""Training: from annotated cells to a trained generator."""
