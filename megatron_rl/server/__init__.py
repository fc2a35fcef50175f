"""Embedded server: a generation engine on transformers with SGLang's HTTP contract."""
