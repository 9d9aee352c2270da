"""What commands find out about a cluster: no module here reads a command line or prints."""
