"""An application whose migrations fill in its default rows."""
