"""Workloads and measurements behind `flora bench`: only the CLI and `benchmarks/` come here."""
