"""What leaves a finished run: one model as a directory of its own, on the hub, or the whole run.

Next to whom it leaves for: transformers alone (`model`), the Hugging Face hub (`hub`), another
machine with this package (`bundle`). Nothing is given away that is not proved whole first.
"""
