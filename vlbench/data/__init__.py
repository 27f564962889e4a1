"""Data, from files to batches: sources, sample encoding, images, order, packing."""
