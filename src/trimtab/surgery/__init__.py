"""Rules to a plan, and a plan to a model: attach, detach, merge. The only place where a model is changed."""
