"""The corpus room: text source → cleaned text → tokenizer → token shards → windows.

`nursery`, or the files, tables, hub datasets and mixes of a job become `sources`; `sources` streams
them through `cleaning`; `tokenizer` learns or loads the vocabulary; `writing` writes the token
stream once and `shards` maps it into memory; `windows` cuts it into training examples, each a pure
function of (seed, epoch, index).
"""
