"""Flora: full fine-tunes to low-rank adapters, kept in a registry and served by the thousand from one base model."""

__version__ = "0.1.0"
