"""The data room: shard index, sampler, decoder, frozen encoders and the loader that joins them.

``prepare`` makes shards of folders, lists and other tars, ``inspect`` counts, verifies and shows
what is in shards. ``shards`` finds the samples in tar shards without extracting anything,
``sampler`` says which sample stands in which slot of which step, ``decode`` turns image bytes into
pixels, ``encoders`` turns pixels and captions into latents and text conditions, ``loader`` hands a
data-parallel rank all microbatches of a step at once.
"""
