"""What a YAML file may say, and what it means on this machine."""
