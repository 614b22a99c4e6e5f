"""Pages: captions that say all that is asked for, held-out combinations, and what is drawn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from soar_mega.data.tiny import digits, handwriting, page_text, pages
from soar_mega.data.tiny import text as tiny_text
from soar_mega.data.tiny import vae as tiny_vae

PAGES = [page for held_out in (False, True) for page in pages.make_pages(400, 3, held_out=held_out)]


def test_captions_of_every_kind_are_read_back() -> None:
    assert {page.kind for page in PAGES} == set(pages.KINDS)
    for page in PAGES:
        assert pages.parse_caption(page.caption) == page
    mark = pages.Mark
    assert pages.parse_caption("red 40718 on white").marks[1] == mark(0, "red", 1)
    assert pages.parse_caption("red 3 blue 5 on mint").marks == (
        mark(3, "red", None),
        mark(5, "blue", None),
    )
    assert pages.parse_caption("red 3 b2 5 d4 on white").marks == (
        mark(3, "red", 5),
        mark(5, "red", 15),
    )
    assert pages.parse_caption("five red 3 on pink").marks == (mark(3, "red", None),) * 5


@pytest.mark.parametrize(
    "caption",
    [
        "",
        "a cat",
        "red 12 on white",
        "red 3 on white",
        "one red 3 on white",
        "red 3 b5 5 a1 on white",
    ],
)
def test_other_text_is_no_caption(caption: str) -> None:
    with pytest.raises(ValueError, match="Not a caption of a page"):
        pages.parse_caption(caption)


def test_held_out_combinations_are_a_fifth_and_never_trained() -> None:
    trained = {page.caption for page in pages.make_pages(4000, 0, held_out=False)}
    asked = {page.caption for page in pages.make_pages(4000, 1, held_out=True)}
    assert not trained & asked
    rng = np.random.default_rng(0)
    for kind in pages.KINDS:
        share = np.mean([pages._page(kind, rng).held_out for _ in range(2000)])
        assert 0.15 < share < 0.25, kind


def test_the_order_in_a_caption_does_not_make_a_combination_new() -> None:
    for caption, swapped in (
        ("red 3 blue 5 on white", "blue 5 red 3 on white"),
        ("red 3 b2 5 d4 on white", "red 5 d4 3 b2 on white"),
    ):
        first, second = pages.parse_caption(caption), pages.parse_caption(swapped)
        assert first.held_out == second.held_out
    numbers = {pages.parse_caption(f"red {n} on white").held_out for n in range(1000, 1100)}
    assert numbers == {True, False}


def test_every_caption_fits_the_text_encoders() -> None:
    tokenizers = page_text.make_tokenizers()
    for tokenizer in tokenizers.values():
        unknown = tokenizer.unk_token_id
        for page in PAGES:
            tokens = tokenizer(page.caption).input_ids
            assert len(tokens) <= page_text.TEXT_LENGTH
            # A CLIP's unknown token is its end token, which closes every text.
            assert unknown not in tokens[:-1]


def test_curated_pages_have_their_ink_where_the_caption_says() -> None:
    scans = digits.load_scans("generator")
    pictures = pages.draw_pages(PAGES, scans, 0)
    assert pictures.shape == (len(PAGES), 64, 64, 3)
    size = digits.CELL_SIZE
    for page, picture in zip(PAGES, pictures, strict=True):
        paper = np.array(digits.PAPERS[page.paper])
        changed = np.abs(picture.astype(int) - paper).sum(-1) > 60
        cells = changed.reshape(4, size, 4, size).any((1, 3)).ravel()
        assert cells.sum() == len(page.marks)
        for mark in page.marks:
            assert mark.cell is None or cells[mark.cell]


def test_a_picture_is_a_function_of_seed_and_place() -> None:
    scans = digits.load_scans("generator")
    for raw in (False, True):
        whole = pages.draw_pages(PAGES[:6], scans, 5, raw=raw)
        assert (whole == pages.draw_pages(PAGES[:6], scans, 5, raw=raw)).all()
        assert (whole != pages.draw_pages(PAGES[:6], scans, 6, raw=raw)).any()
        assert (whole[:3] == pages.draw_pages(PAGES[:3], scans, 5, raw=raw)).all()


def test_raw_pages_never_run_over_the_edge() -> None:
    """Digits may sit a little off their cells, the outermost ones partly outside the picture."""
    scans = digits.load_scans("generator")
    corner = [pages.parse_caption("red 3 a1 5 d4 on white")] * 50
    pictures = pages.draw_pages(corner, scans, 0, raw=True)
    paper = np.array(digits.PAPERS["white"])
    assert (np.abs(pictures[:, 18:46, 18:46].astype(int) - paper) <= 1).all()


def test_shipped_parts_carry_pages() -> None:
    """The VAE keeps several inks apart; a token's embedding tells its word and its neighbours'."""
    vae = tiny_vae.load_vae(handwriting.SHIPPED_VAE)
    some = pages.make_pages(64, 9, held_out=True)
    for raw in (False, True):
        pictures = pages.draw_pages(some, digits.load_scans("held_out"), 0, raw=raw)
        again = tiny_vae.decode(vae, tiny_vae.encode(vae, pictures))
        assert tiny_vae.psnr(pictures, again) > 30.5, raw  # 32.4 and 32.0 dB
    parts = page_text.load_text_parts()
    tokens_BT = tiny_text.tokenize(parts["tokenizer_3"], [page.caption for page in PAGES])
    with torch.no_grad():
        states_BTE = parts["text_encoder_3"](tokens_BT)[0]
    inner_NE, own_N = states_BTE[:, 1:-1].flatten(0, 1), tokens_BT[:, 1:-1].flatten()
    half = len(inner_NE) // 2
    for labels in (own_N, tokens_BT[:, :-2].flatten(), tokens_BT[:, 2:].flatten()):
        probe = LogisticRegression(max_iter=200).fit(inner_NE[:half], labels[:half])
        assert probe.score(inner_NE[half:], labels[half:]) > 0.9
