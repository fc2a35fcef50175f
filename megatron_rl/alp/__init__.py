"""Adaptive layerwise perturbation (arXiv 2603.19470): noise equal in every layout, and the layer that adds it."""
