"""diffusers and transformers, told to be quiet."""

from __future__ import annotations


def quiet_libraries() -> None:
    """Stop both from printing loading bars and remarks, which bury what our programs say.

    Call it before importing their pipelines: some remarks are made while those are imported.
    """
    import diffusers
    import transformers

    for library in (transformers, diffusers):
        library.logging.set_verbosity_error()
        library.logging.disable_progress_bar()
