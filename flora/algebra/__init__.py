"""What can be done with whole adapters: verify them against their pair, merge them, tell two apart.

One tensor in memory at a time; nothing here prints, and nothing writes but `write_checkpoint.py`.
"""
