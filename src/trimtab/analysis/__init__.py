"""What tuning did to a model: weights of a tuned model against those of its base."""
