"""Compares the weights of a tuned model with those of its base."""
