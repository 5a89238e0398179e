"""What all tests of one service on real servers share."""

import pytest


@pytest.fixture(autouse=True)
def nobody_to_send_elsewhere(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers here are alone, and stop without waiting for channels that go to others; those of the mesh do wait."""
    if request.path.parent.name != "mesh":
        monkeypatch.setattr("mesh.server._FAREWELL_S", 0.0)
