"""Server processes: start and stop engines and the router on this machine."""
