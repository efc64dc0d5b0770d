"""What held in 0.1, and must go on to hold."""

from __future__ import annotations

import pytest
from harness import Features


@pytest.mark.parametrize("name", ["rgb16.tif", "grey16_be.tif", "jpg_bad_mpf.jpg"])
def test_harmless_files_show_the_photograph(name: str, features: Features) -> None:
    ours, reference = features(name, "ref_grey.png" if "grey" in name else "ref.png")
    assert ours @ reference > 0.999
