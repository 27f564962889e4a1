"""The connector contract as checks on a small random model: `python -m vlbench test-connector`."""
