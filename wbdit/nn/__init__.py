"""The networks, and what makes their calls cheap."""
