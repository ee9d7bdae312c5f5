"""The pages of several runs compared, and of what tuning did to weights."""
