"""How weights reach the engines: through a folder, by broadcast, or by shared memory of one machine."""
