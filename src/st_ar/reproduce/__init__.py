"""The paper's tables and figures as plans of commands.

paper.py lists what is compared and at which scales, plan.py orders the commands, page.py shows the results beside the paper's.
"""
