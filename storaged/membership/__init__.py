"""Who is there: signs of life, the cluster map, and the leader that writes it."""
