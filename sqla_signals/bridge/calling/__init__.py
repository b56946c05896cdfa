"""How one receiver is called."""
