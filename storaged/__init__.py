"""The storage daemon."""
