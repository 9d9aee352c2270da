"""Checking in the background: own copies (selfcheck) and those of a group (agreement)."""
