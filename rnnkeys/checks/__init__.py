"""Checks of wirings and batches, each with its message and remedy."""
