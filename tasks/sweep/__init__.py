"""sweep: the parts of a search over settings; flows/sweep.py puts them together.

It is no stage. A candidate is merged by the merge task and scored by the evaluate task, which know
nothing of a search; what is here knows neither of them.
"""
