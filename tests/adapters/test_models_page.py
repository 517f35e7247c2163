"""Tests that the row of each family in docs/models.md agrees with the number of modules that run on the op."""

from __future__ import annotations

import pytest

from tests.adapters.models_page import PAGE, on_the_op
from tests.adapters.test_forms import ROUNDED
from tests.support.small_models import FAMILIES

pytestmark = pytest.mark.filterwarnings("ignore")  # the libraries' warnings

ROWS = {cells[1].strip(): cells for line in PAGE.read_text().splitlines() if len(cells := line.split("|")) == 9}


def test_the_page_has_every_family_and_no_other():
    assert set(ROWS) - {"family", "---"} == set(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_modules_on_the_op(family):
    for library in ("timm", "torchvision", "transformers", "monai", "mmpretrain"):
        if family.lower().startswith(library):
            pytest.importorskip(library)
    assert ROWS[family][3].strip() == on_the_op(family)


@pytest.mark.parametrize("family", FAMILIES)
def test_errors_are_those_of_rounding(family):
    in_float64, in_float32 = float(ROWS[family][4]), ROWS[family][5].split()
    assert in_float64 < 1e-10 or family in ROUNDED
    assert float(in_float32[0]) <= 10 * float(in_float32[1].strip("()")) + 1e-6
