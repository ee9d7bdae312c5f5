"""Plans, and what they do to a model: attach, detach, merge. No other folder changes a model's modules."""
