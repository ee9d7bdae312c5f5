"""Models on disk: which one a name means, how it is read and quantised, and what GGUF files hold."""
