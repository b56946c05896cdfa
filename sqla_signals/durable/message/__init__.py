"""The event as it travels: the envelope, the values by the types of their columns, and names."""
