"""How weights are stored in a source checkpoint, and how they become plain tensors."""
