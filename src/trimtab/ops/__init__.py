"""Pure tensor functions and autograd functions: no ``nn.Module``, no configuration."""
