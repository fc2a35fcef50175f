"""Tables of cases: an input, the right outcome, and where there is one the public report of the fault."""
