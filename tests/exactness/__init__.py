"""The proof of exactness: random programs, with database triggers as the witness of what was written."""
