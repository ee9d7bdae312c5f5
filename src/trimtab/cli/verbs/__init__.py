"""The verbs of the command line, a thin file each."""
