"""Tables of inputs and the right outcome of each, one table per area."""
