"""What a verb draws on the terminal while it works."""
