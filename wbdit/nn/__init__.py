"""The networks, their caches of weight-derived values, and their CUDA graphs."""
