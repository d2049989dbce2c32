"""Names, digests and references: one grammar, and nothing hostile fits it."""

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flora.errors import NameInvalid
from flora.names import Digest, Reference, check_alias, check_name, parse_reference

HEX = "0123456789abcdef" * 4
part = st.from_regex(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,62}[A-Za-z0-9_])?", fullmatch=True)
part = part.filter(lambda text: ".." not in text)
name = st.one_of(part, st.tuples(part, part).map("/".join))
alias = st.from_regex(r"[A-Za-z](?:[A-Za-z0-9._-]{0,62}[A-Za-z0-9_])?", fullmatch=True)
alias = alias.filter(lambda text: ".." not in text and not (text[0] == "v" and text[1:].isdigit()))
reference = st.one_of(
    st.builds(Reference, name),
    st.builds(Reference, name, alias=alias),
    st.builds(Reference, name, version=st.integers(1, 10**9 - 1)),
    st.builds(
        Reference,
        name,
        digest=st.text("0123456789abcdef", min_size=64, max_size=64).map("sha256:{}".format).map(Digest),
    ),
)


@given(reference)
def test_what_a_reference_prints_parses_to_itself(ref):
    assert parse_reference(str(ref)) == ref


@given(st.text(max_size=80))
def test_any_text_is_a_reference_or_is_refused_by_name(text):
    try:
        parsed = parse_reference(text)
    except NameInvalid:
        return
    assert str(parsed) == text
    assert set(text) <= set(string.ascii_letters + string.digits + "._-/:@")
    assert ".." not in text


@pytest.mark.parametrize(
    "text",
    [
        "", ".", "..", "../x", "/etc/passwd", "a/../../b", "a/..", "a..b", "a/b/c", "/a", "a/", "a//b", "~/x", "-rf",
        ".hidden", "a.", "a-", "%2e%2e", "x#/../", "file://x", "http://host/x", "C:\\x", "a\\b", "a b", " a", "a ",
        "a\n", "a\r\nb", "a\0b", "naïve", "а", "a\u202eb", "a\u200bb", "１", "x" * 65, "x" * 10_000, "a;rm", "a|b",
        "a$b", "a`b", "a'b", 'a"b', "a*", "a?",
    ],
)  # fmt: skip
def test_a_hostile_name_is_refused(text):
    with pytest.raises(NameInvalid):
        parse_reference(text)
    with pytest.raises(NameInvalid):
        check_name(text)


@pytest.mark.parametrize(
    "text",
    ["a:", "a@", "a@v0", "a@v01", "a@v", "a@1", "a@vx", "a@v1000000000", "a:b:c", "a@v1@v2", "a:b@v1", "a:v1", "a:v007",
     "a:1st", "a:-x", "a:b/c", "a:..", f"a@sha256:{HEX[:-1]}", f"a@sha256:{HEX}0", f"a@sha256:{HEX.upper()}",
     f"a@sha256-{HEX}", f"a@sha512:{HEX}", f"a@../sha256:{HEX}", f"a@{HEX}", "a@latest"],
)  # fmt: skip
def test_a_malformed_alias_version_or_digest_is_refused(text):
    with pytest.raises(NameInvalid):
        parse_reference(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("sql", Reference("sql")),
        ("ann/sql-v2", Reference("ann/sql-v2")),
        ("sql:prod", Reference("sql", alias="prod")),
        ("sql:v2.1", Reference("sql", alias="v2.1")),
        ("sql@v12", Reference("sql", version=12)),
        (f"ann/sql@sha256:{HEX}", Reference("ann/sql", digest=Digest(f"sha256:{HEX}"))),
    ],
)
def test_references_mean_what_they_say(text, expected):
    assert parse_reference(text) == expected


@pytest.mark.parametrize("text", ["sql:prod", "sql@v1", f"sql@sha256:{HEX}"])
def test_a_bare_name_has_no_alias_version_or_digest(text):
    with pytest.raises(NameInvalid, match="names a version or an alias"):
        check_name(text)
    assert check_name("sql") == "sql"


@pytest.mark.parametrize("text", ["v1", "v007", "1st", "", "a/b", "a b", "..", "x" * 65])
def test_what_cannot_be_an_alias(text):
    with pytest.raises(NameInvalid):
        check_alias(text)


@pytest.mark.parametrize(
    "text",
    ["", HEX, f"sha256:{HEX[:-1]}", f"sha256:{HEX}0", f"sha256:{HEX.upper()}", f"sha256-{HEX}", f"../sha256:{HEX}",
     f"sha256:{HEX}\n", f"sha256:../{HEX[3:]}"],
)  # fmt: skip
def test_what_is_no_digest(text):
    with pytest.raises(NameInvalid):
        Digest(text)


def test_a_digest_is_printed_whole_and_short():
    digest = Digest(f"sha256:{HEX}")

    assert str(digest) == f"sha256:{HEX}"
    assert digest.hex == HEX
    assert digest.short == "0123456789ab"
