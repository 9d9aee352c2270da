"""sheepfs: VDIs of a storage cluster, shown as raw files."""
