"""What a mapper writes, and whether two values are the same."""
