"""HTML pages and figures for an evaluation or a readout."""
