"""Where runs lie on several nodes: on one storage that all of them see, or on one of each node.

Enters: how the job says that its runs are stored. Leaves: `Storages`, which knows the storages
there are, the rank that works on each (its lead) and how to send finished work from one to the
others. With one storage, which is every run on one node, work on each is work on rank 0 and
nothing is sent.

leads     which storages there are, who works on each, what goes from one to another
finding   whether they are what the job promises
sending   a directory's files on their way

Every function that communicates is collective: all ranks call it, in the same order. Paths are
those of every node: `--runs` is the same words everywhere.
"""

from babyllama_ds.storages.finding import SEEN_WITHIN_S, find_storages
from babyllama_ds.storages.leads import Storages, storages_of_nodes

__all__ = ["SEEN_WITHIN_S", "Storages", "find_storages", "storages_of_nodes"]
