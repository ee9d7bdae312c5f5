"""Models on disk: finds them by name, reads them, quantises them, and converts GGUF files."""
