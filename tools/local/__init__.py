"""A cluster on this machine: `tools/quickstart`, and what the bench measures."""
