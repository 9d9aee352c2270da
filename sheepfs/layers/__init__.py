"""Layers and the maps that name them: snapshots, clones, shared ranges, views of stored maps."""
