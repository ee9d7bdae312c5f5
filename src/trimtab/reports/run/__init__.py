"""The page and the tables of one run."""
