"""Measures a training step against the published procedure on diffusers' own model.

``load`` what both sides compute, and the variants of each; ``ours`` and ``reference`` the two
sides; ``measure`` one of them, once; ``compare`` all of them in turn; ``record`` what was found, as
JSON; ``report`` and ``picture`` for people.
"""
