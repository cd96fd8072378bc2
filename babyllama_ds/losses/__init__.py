"""Losses: hidden states, heads, labels and counts enter; scalars with a graph leave.

Pure functions of tensors: nothing here knows ranks or configuration. Logged is only
what the machine makes different: a smaller chunk, no kernel.
"""
