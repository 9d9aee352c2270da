"""The functions behind the commands: each is called AREA_VERB, asks, acts and prints."""
