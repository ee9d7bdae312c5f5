"""What a model is worth on labelled rows: scored choices, generated answers, perplexity, and the metrics of each.

`evaluate` is the entrance.
"""
