"""sheepfs: VDIs of a storage cluster, shown as raw files."""

__version__ = "0.1.0"
