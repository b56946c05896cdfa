"""What changed: plain values, no session and no SQL."""
