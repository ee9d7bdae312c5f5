"""Rows of data files -> prompts and answers -> token ids and labels -> batches.

Nothing is imported here: ``rows`` and ``sources`` do without torch, and whoever wants only them should not pay for it.
"""
