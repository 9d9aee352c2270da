"""Who holds a VDI, what only the holder may do with it, and what happens after its death."""
