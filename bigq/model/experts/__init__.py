"""Banks of experts: how a block calls them, one expert at a time, and how checkpoints store them."""
