"""Rows of data files become examples, then token ids and labels, then batches.

Nothing is imported here, because ``rows``, ``sources`` and ``forms`` work without torch.
"""
