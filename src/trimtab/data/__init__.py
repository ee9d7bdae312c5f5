"""Rows of data files become examples, then token ids and labels, then batches.

Nothing is imported here: ``rows``, ``sources`` and ``forms`` do without torch, and whoever wants only them should not
pay for it.
"""
