"""What the parts of a job cost: memory, arithmetic and data moved. Pure functions."""
