"""What is promised of connecting, installing and flushing: each rule has a test named after it."""
