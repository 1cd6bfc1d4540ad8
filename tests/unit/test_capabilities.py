"""What fits is what was stored, and nothing by the name fits nothing."""

from __future__ import annotations

from bus.capabilities import fits, hashed, named, new_secret


def test_a_secret_names_what_it_is_for_and_fits_its_own_hash_among_others() -> None:
    secret = new_secret("tok_1")
    assert named(secret) == "tok_1"
    assert fits(secret, (hashed(new_secret("tok_1")), hashed(secret)))
    assert not fits(secret, (hashed(new_secret("tok_1")),))
    assert not fits(secret, ())


def test_nobody_looks_at_a_secret_that_is_too_long() -> None:
    long = new_secret("tok_1").ljust(257, "x")
    assert fits(long[:256], (hashed(long[:256]),))
    assert not fits(long, (hashed(long),))
