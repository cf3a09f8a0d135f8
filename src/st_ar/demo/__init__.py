"""`st-ar demo`: a local web demo to generate images, compare models and inspect them. Widgets are in tabs.py and *_tab.py."""
