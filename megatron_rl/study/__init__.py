"""Studies: a grid of runs from one file, their results in tables, and a verdict."""
