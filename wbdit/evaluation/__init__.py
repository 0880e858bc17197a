"""Anyone's synthetic cells beside real ones. Knows no model."""
