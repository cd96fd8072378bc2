"""The embedded corpus: child-directed English, written by a grammar.

Enters: how many words, how many minimal pairs, a seed. Leaves: training text, held-out text and
minimal pairs on disk (`write`). Inside, in the order in which they build on each other: `lexicon`
(words and who can do what), `held_out` (combinations kept from training), `grammar` (forms and
clauses), `story` (who is where, who was mentioned), `events`, `remarks` and `questions` (what
happens and what is said about it), `scenes` (one line of text each), `pairs`.
"""
