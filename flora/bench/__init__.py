"""Workloads and measurements behind `benchmarks/`, which alone comes here."""
