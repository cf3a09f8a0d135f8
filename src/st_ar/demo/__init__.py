"""`st-ar demo`: a web page on this machine that draws, compares and explains. The logic is apart from the widgets (*_tab.py)."""
