"""Oracles, problems, tolerances and strategies that the tests share."""
