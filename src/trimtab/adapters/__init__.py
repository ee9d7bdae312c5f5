"""Adapters on disk. ``store`` saves and loads them, ``formats/`` has one file for each format, and ``safe_read`` reads
what others wrote."""
