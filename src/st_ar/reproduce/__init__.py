"""The paper's tables and figures as plans of commands: paper.py says what is compared, scales.py at which size, plan.py in which
order, page.py shows what came out beside the paper's numbers.
"""
