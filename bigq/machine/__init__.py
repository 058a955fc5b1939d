"""What this machine has: devices, memory, free space, and how fast it computes."""
