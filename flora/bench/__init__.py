"""Workloads and measurements: behind `flora bench` and the scripts of `benchmarks/`."""
