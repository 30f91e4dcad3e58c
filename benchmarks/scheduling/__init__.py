"""A simulated cluster under load, to prove and to measure the scheduling policy."""
