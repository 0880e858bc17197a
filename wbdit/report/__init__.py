"""Pages and pictures of an evaluation or a readout."""
