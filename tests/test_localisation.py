"""benchmarks/localisation.py: where a teacher's credit lies, by hand."""
import math

import pytest
import torch

from benchmarks.localisation import Case, localisation, measures, table_of_credit


def test_credit_mass_and_its_denominators():
    credit = torch.zeros(200)
    credit[100], credit[104], credit[30] = 1.0, -2.0, 1.0
    found = localisation(credit, 100)
    assert found["mass/w2"] == 0.25 and found["mass/w4"] == 0.75 and found["mass/w32"] == 0.75
    assert found["mass50/w2"] == pytest.approx(1 / 3) and found["mass50/w4"] == 1.0
    assert found["credit/at_tau"] == 1.0 and found["credit/before_tau"] == pytest.approx(0.01)
    assert found["credit/after_tau"] == pytest.approx(2 / 99)
    assert "credit/before_tau" not in localisation(credit[:5] + 1, 0)


def test_a_share_of_no_credit_is_left_out():
    """Where teacher and student agree everywhere, and where they do so within 50 tokens of τ."""
    credit = torch.zeros(200)
    nothing = localisation(credit, 100)
    assert nothing == {"credit/at_tau": 0.0, "credit/before_tau": 0.0, "credit/after_tau": 0.0}
    credit[0] = 1.0
    far = localisation(credit, 100)
    assert far["mass/w32"] == 0.0 and not any(name.startswith("mass50") for name in far)
    assert all(math.isfinite(value) for value in far.values())


def test_responses_whose_teacher_agrees_have_a_table_too():
    """Credit of 0 everywhere has no shares."""
    case = Case(None, None, None, tau=0, rate=0.5, advantage=-1.0)
    row = measures([torch.zeros(3)], [case])
    assert row["mass/w2"] == 0 and len(table_of_credit({"none": row})) == 3
