"""Rollouts: the HTTP client, the embedded server behind the same contract as SGLang, and the sampling of groups."""
