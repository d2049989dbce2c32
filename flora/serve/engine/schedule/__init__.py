"""Every decision about pages, turns and rows: integers only, no torch and no clock."""
