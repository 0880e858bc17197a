"""From cells to a trained generator."""
