"""The calibration rows between blocks: their hidden states, where these are stored, and checkpoints of them."""
