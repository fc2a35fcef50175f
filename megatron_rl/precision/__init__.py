"""Low precision: formats and their scales, quantised linears, and the plan that says who uses which."""
