"""Braces in prompts."""

import pytest

from snapgen_mlx.errors import UsageError
from snapgen_mlx.prompts import expand


def test_braces_stand_for_every_choice_in_order():
    assert expand("a cat") == ["a cat"]
    assert expand("a {red, blue} {cat,dog}") == [
        "a red cat",
        "a red dog",
        "a blue cat",
        "a blue dog",
    ]
    assert expand("a {,big} cat") == ["a cat", "a big cat"]
    assert expand("{cat,cat}") == ["cat"]


@pytest.mark.parametrize("text", ["a {cat", "cat}", "{a,{b,c}}", "{cat}", "{}", "{a,b}" * 10])
def test_what_cannot_be_meant_is_refused(text):
    with pytest.raises(UsageError):
        expand(text)
