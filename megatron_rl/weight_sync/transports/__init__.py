"""Transports: they send weights to engines through a folder, by broadcast, or through shared memory of one machine."""
