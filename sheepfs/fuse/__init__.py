"""The FUSE side: the kernel protocol, the tap between kernel and libfuse, the namespace."""
