"""Adapters on disk. ``store`` saves and loads them, ``formats/`` has a file for each format, and ``safe_read`` reads
files that others wrote."""
