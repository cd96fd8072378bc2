"""Report: a finished run's directory enters, one JSON object and readable pages leave.

`collect` reads the directory into a plain dictionary, `markdown` and `card` put that into words,
`write` stores the report. Everything shown comes from the dictionary, so the page, the model card
and the JSON never disagree.
"""
