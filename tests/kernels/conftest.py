"""Every kernel has a twin in torch; a test that uses `ways` is run with each."""

import pytest

from hatrack.kernels import native


@pytest.fixture(params=["kernels", "torch"])
def ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which of the two does the work: `kernels` or `torch`."""
    if request.param == "torch":
        monkeypatch.setattr(native, "library", lambda: None)
    elif native.library() is None:
        pytest.skip("no compiler for the kernels here")
    return str(request.param)
