"""The studies of the literature, as programs: many runs, each in a process of its own, and what they say together."""
