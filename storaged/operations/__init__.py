"""Operations on objects.

Each module on top of the one before: requests, durability, copies, comparing, replica.
"""
