"""The signed statement in the page's cookie."""

from __future__ import annotations

import pytest

from service.page.logins import LOGIN_S, Login, signed, verified

SECRET = b"s" * 32
LOGIN = Login("0123abcd", 7)


def test_what_was_signed_is_known_until_its_end() -> None:
    """By the token's id; never with the token."""
    value = signed(LOGIN, 1000.0, SECRET)
    assert verified(value, 1000.0, SECRET) == LOGIN
    assert verified(value, 1000.0 + LOGIN_S - 1, SECRET) == LOGIN
    assert verified(value, 1000.0 + LOGIN_S, SECRET) is None


@pytest.mark.parametrize(
    "change",
    [
        lambda value: value.replace("0123abcd", "fedc9876"),
        lambda value: value.replace(".7.", ".8."),
        lambda value: value.replace(".7.", "."),
        lambda value: value.replace(".44200.", ".99999."),
        lambda value: value[:-1] + ("0" if value[-1] != "0" else "1"),
        lambda value: value.partition(".")[0],
        lambda _: "",
        lambda _: "..",
        lambda _: "é.1.x",
    ],
)
def test_anything_else_is_nobody(change: object) -> None:
    """Another token, other ends before, a later end, another signature, none, and no text of ours."""
    value = signed(LOGIN, 1000.0, SECRET)
    assert callable(change)
    assert change(value) != value
    assert verified(change(value), 1000.0, SECRET) is None


def test_another_secret_signs_otherwise() -> None:
    """A login of another store's replicas is none here."""
    assert verified(signed(LOGIN, 1000.0, b"o" * 32), 1000.0, SECRET) is None
