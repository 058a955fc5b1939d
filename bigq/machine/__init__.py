"""The machine: its devices, memory, free disk space and peak rates."""
