"""Launching: the ranks of a run on one machine."""
