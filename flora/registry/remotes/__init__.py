"""Places beyond this machine: the Hugging Face Hub."""
