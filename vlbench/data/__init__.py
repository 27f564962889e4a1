"""From files to batches: samples, templates, sources, order, packing."""
