"""From a flush to its signals."""
