"""The object store of one node: files on one disk."""
