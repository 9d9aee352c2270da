"""For tools: talk to one daemon, or to all that the cluster map knows."""

from sheepfs.net.link import Link, connect_node

__all__ = ["Link", "connect_node"]
