"""Losses: hidden states, heads, labels and counts enter; scalars with a graph leave.

Pure functions of tensors: nothing here knows ranks, configuration or logging.
"""
