"""Adaptive layerwise perturbation (arXiv 2603.19470): noise that every layout agrees on, and the layer that adds it."""
