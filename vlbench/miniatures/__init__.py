"""The embedded pretrained parts of size=tiny, and what trains them."""
