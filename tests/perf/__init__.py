"""Benchmarks: ``make bench``. Not part of the suite: clocks differ, counts do not."""
