"""What the engine does in its own way on a CPU."""
