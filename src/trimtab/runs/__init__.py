"""The folder of a run: its files, and how a run that is there is read."""
