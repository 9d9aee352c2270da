"""Command line programs, installed as `sheepfs_tools`."""
