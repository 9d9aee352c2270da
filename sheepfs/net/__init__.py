"""Trio shells around the pure core: etcd, connections, the object client."""
