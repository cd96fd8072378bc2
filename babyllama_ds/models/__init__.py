"""Models: a spec or a path enters, a plain causal language model and its parts leave.

`attention` decides which kernel a model uses, `build` makes or loads it, `parts` splits it into
the backbone that gives final hidden states and the linear head that the losses apply themselves.
"""
