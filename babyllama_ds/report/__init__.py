"""Report: a run's directory enters, done or not; one JSON object and readable pages leave.

`collect` reads the directory into a plain dictionary, `markdown`, `html` and `card` put that into
words, `write` stores the report. Everything shown but the curves (`metrics`) comes from the
dictionary, so the pages, the model card and the JSON never disagree.
"""
