"""From an INSERT, UPDATE or DELETE of many rows to its signals."""
