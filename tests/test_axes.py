from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from interv.spec import axes


@given(st.integers(1, 50), st.data())
def test_a_range_is_inclusive(size: int, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, size - 1))
    last = data.draw(st.integers(first, size - 1))
    assert axes.expand(f"{first}-{last}", size) == list(range(first, last + 1))
    assert axes.expand("all", size) == list(range(size))
    assert axes.expand(first - size, size) == [first]


@pytest.mark.parametrize("item", [5, -6, "3-5", "0-99"])
def test_outside_the_axis_is_an_error(item: int | str) -> None:
    with pytest.raises(axes.AxisError, match="out of range"):
        axes.expand(item, 5)


@pytest.mark.parametrize("value", [[], True, 1.5, "5-3", "nowhere", [0, "x"], None, -1])
def test_what_is_right_for_no_axis_is_refused(value: object) -> None:
    with pytest.raises(axes.AxisError) as caught:
        axes.check(value, ("last",), negative=False)
    assert "last" in caught.value.expected


def test_names_and_negative_indices_are_allowed_where_they_mean_something() -> None:
    axes.check([0, -1, "last", "2-3", "all"], ("last",), negative=True)
    assert axes.expand("last", 5) is None
