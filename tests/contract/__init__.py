"""Sections 1 to 3 of the contract: each sentence has a test named after it."""
