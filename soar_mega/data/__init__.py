"""The data room: from shards to the microbatches of a step.

``prepare`` makes shards, ``inspect`` looks at them, ``encoded`` writes and reads sets of latents
and embeddings. ``shards`` finds samples in tars, wherever they lie. ``sources`` joins what a run
trains on, ``order`` says which sample comes when, ``plan`` what is made of it in which slot.
``pictures`` reads and ``decode`` decodes, ``online`` encodes with the models of ``encoders``;
``loader`` hands a data-parallel rank all microbatches of a step at once.
"""
