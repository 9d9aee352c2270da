"""Catching up with members that stayed, at the pace that clients leave."""
