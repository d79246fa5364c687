"""Long-context methods in integers and numpy: how a text is cut, where its keys are, what a query sees.

Mesa is ``config.py``, ``plan.py``, ``stairs.py`` and ``mesa.py``; each other method whose graphs are static is a file.
"""
