"""Errors: one tree, each with its code, exit code and three parts."""

import re

import pytest

from flora import errors
from flora.errors import AdapterNotFound, FloraError, ShapeMismatch

CLASSES = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, FloraError)]


def test_an_error_prints_what_cause_and_fix():
    error = ShapeMismatch("w is [2] here, [3] there", cause="two architectures", fix="give the right base", tensor="w")

    assert str(error).splitlines() == [
        "error[FL-SHAPE]: w is [2] here, [3] there",
        "cause: two architectures",
        "fix: give the right base",
    ]
    assert error.tensor == "w"
    assert error.values == {"tensor": "w"}


def test_an_error_without_cause_and_fix_is_one_line():
    assert str(AdapterNotFound("no adapter is named x")) == "error[FL-ADAPTER]: no adapter is named x"


def test_every_class_has_a_code_of_its_own():
    codes = [kind.code for kind in CLASSES]

    assert len(set(codes)) == len(codes)
    assert all(re.fullmatch(r"FL-[A-Z]+", code) for code in codes)


@pytest.mark.parametrize("kind", [kind for kind in CLASSES if kind is not FloraError], ids=lambda kind: kind.__name__)
def test_the_modules_page_lists_every_class_with_its_exit_code_and_code(kind):
    line = next(line for line in errors.__doc__.splitlines() if re.search(rf"\b{kind.__name__}\b", line))

    assert re.search(rf"\b{kind.exit_code}\s+{kind.code}\b", line)
