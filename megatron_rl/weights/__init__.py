"""Weights between Hugging Face folders, megatron-core models and rollout engines: one converter for files and live sync."""
