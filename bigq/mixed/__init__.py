"""Mixed bits: which Linears get how many bits, so that a budget of bits per weight holds."""
