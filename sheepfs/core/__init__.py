"""Pure logic: no sockets, files, clocks or randomness."""
