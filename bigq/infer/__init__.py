"""Models tried out: perplexity and KL divergence, text generation, packed Linears."""
