"""The examples do what they claim."""
