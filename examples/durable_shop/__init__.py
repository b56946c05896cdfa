"""A shop whose receivers run in other processes, and run whatever dies."""
