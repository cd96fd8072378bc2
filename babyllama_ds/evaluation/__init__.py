"""Evaluation: a finished model enters, the numbers it is judged by leave.

`cross_entropy` measures development text (cross-entropy, perplexity, bits per byte),
`minimal_pairs` measures grammar (which of two sentences the model finds likelier), `evaluate`
puts both into the JSON object of one model. `forward` is how these run a model: in eval mode,
without gradients, without ever holding the logits of a whole batch. `fine_tuning` has copies of it
learn tasks with labels.
"""
