"""Engines: the pool that generates with several servers, and control of each server."""
