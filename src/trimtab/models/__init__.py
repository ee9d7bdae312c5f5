"""Models on disk: which one a name means, how it is read, quantised and written, and what GGUF files hold."""
