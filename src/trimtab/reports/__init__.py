"""What a run, a study or a search was worth, told from the files of its folder: a page, and tables for a terminal.

Nothing here imports torch or loads a model, so a report can be built anywhere and again at any time.
"""
