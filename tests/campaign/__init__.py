"""Tests that draw lives, faults and extremes. `make test` has a short form of them, `make campaign` the long one."""
