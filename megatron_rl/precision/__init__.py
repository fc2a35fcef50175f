"""Low precision: formats and their scales, quantized linears, and the plan that selects a format for every tensor."""
