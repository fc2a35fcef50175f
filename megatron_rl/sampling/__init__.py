"""A step's groups end to end: prompt draws, sampling and verification, finished groups on disk, and the batch."""
