"""Studies: many runs, each a cell of its own, compared or searched."""
