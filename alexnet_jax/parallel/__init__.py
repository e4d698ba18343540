"""The device mesh, several processes, and settings of a CPU."""
