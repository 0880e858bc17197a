"""What each block does, and which genes it speaks for."""
