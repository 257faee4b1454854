"""The limits that the environment sets in Ray Serve's proxy."""

import pytest

from ddm.errors import ConfigError
from serve.http.limits import proxy_middlewares


def test_the_environment_sets_the_limits_of_the_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DDM_BODY_BYTES", "1000")
    monkeypatch.setenv("DDM_BODY_TIMEOUT_S", "2.5")
    (middleware,) = proxy_middlewares()
    assert middleware.kwargs == {
        "body_bytes": 1000,
        "upload_bytes": 4 << 20,
        "body_timeout_s": 2.5,
    }


@pytest.mark.parametrize("value", ["", "64k", "0", "-1", "1e3"])
def test_a_limit_that_is_none_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("DDM_UPLOAD_BYTES", value)
    with pytest.raises(ConfigError, match="^DDM_UPLOAD_BYTES must be an integer above 0, got '"):
        proxy_middlewares()
