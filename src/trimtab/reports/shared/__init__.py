"""What all pages have in common: the shell, numbers and words, figures."""
