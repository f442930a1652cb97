"""Kill, stop and starve runs of the tutorials: ``python -m scripts.chaos``."""
