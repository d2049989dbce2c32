"""What the documentation takes from the code when it is built, so that no page can be older than what it describes."""
