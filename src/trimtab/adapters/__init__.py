"""Adapters on disk. One file of this folder is one layout; ``store`` saves and loads whichever it is."""
