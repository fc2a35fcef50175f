"""Statistics of studies: pure functions over numpy arrays, one subject a file. No number leaves without an interval."""
