"""Measurements of the white-box blocks, and the genes of their heads and atoms."""
