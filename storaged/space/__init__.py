"""Giving space back: what nobody names, and groups that have moved away."""
