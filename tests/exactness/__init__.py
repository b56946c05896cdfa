"""The proof of exactness: random programs, and triggers as the witness of what they wrote."""
