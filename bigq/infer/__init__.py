"""Using models: perplexity and KL divergence, text generation, packed Linears."""
