"""Low precision: formats and their scales, quantized linears, and the plan that says who uses which."""
