"""Launcher: starts and ends the ranks of a run on one machine."""
