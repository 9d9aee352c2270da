"""Pure decisions of the storage daemon."""
