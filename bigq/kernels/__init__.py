"""The arithmetic that is worth making fast; one module per kernel, each knowing tensors and nothing of bigq."""
