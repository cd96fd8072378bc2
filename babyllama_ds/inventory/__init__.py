"""What lies in a store: a runs folder enters; a table leaves, or the store without what is removed.

entries    what lies there
uses       which runs use what
removing   what is taken away, under the locks
text       how it is told
"""
