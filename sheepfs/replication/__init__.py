"""Objects as their holder sees them: changes to all replicas, reads from any, making them equal."""
