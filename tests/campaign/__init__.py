"""Tests that draw lives, faults and extremes. `make test` runs a short form, and `make campaign` the long one."""
