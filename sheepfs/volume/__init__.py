"""One open VDI or snapshot.

An open VDI, each module on top of the one before: reading, writing, mapping, recording,
attaching, volume. An open snapshot: reading, frozen.
"""
