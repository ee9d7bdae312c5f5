"""What lies on disk. One file is one format."""
