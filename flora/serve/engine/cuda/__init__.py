"""The engine's device side on a GPU: overlapped steps, captured decode graphs, sampling and copies off the loop."""
