"""Batches of sequences: segment starts and masks. No network and no kernel."""
