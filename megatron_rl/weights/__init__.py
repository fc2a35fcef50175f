"""Conversion of weights between Hugging Face folders, megatron-core models and rollout engines.

One converter serves both files and live weight updates.
"""
