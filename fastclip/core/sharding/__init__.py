"""Gradients that are sharded over processes (DTensors): each process works on its shards, one all-reduce joins them.

`sharded` does what `fastclip.core.prepared` does, by all processes together; `layout` works out which process counts
which gradient; `collectives` sends norms through an all-reduce.
"""
