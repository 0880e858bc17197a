"""Every generator in one table: same cells, same genes, same labels asked for, same time to train, same evaluation."""
