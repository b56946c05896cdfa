"""What happens at the end of a transaction."""
