"""The program `sheepctl`."""
