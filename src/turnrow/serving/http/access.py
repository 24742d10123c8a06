"""Who may do what: keys, compared without telling by the time it takes how much of one was right."""

from __future__ import annotations

import hmac
from hashlib import sha256

from starlette.requests import Request

from turnrow.serving.http.errors import ApiError
from turnrow.serving.http.service import service_of

__all__ = ["may_manage", "may_use"]


def may_use(http: Request) -> None:
    """Let in who has a key, or everybody if there is none.

    Raises:
        ApiError: 401.
    """
    settings = service_of(http).settings
    if settings.api_key is not None:
        _check(http, settings.api_key, settings.admin_key)


def may_manage(http: Request) -> None:
    """Let in who has the key to load and unload adapters.

    Raises:
        ApiError: 401; or 403, nobody may.
    """
    settings = service_of(http).settings
    if not settings.managed:
        raise ApiError(
            403,
            "adapters are neither loaded nor unloaded here: start the server with --api-key, --admin-key or --allow-adapter-management",
            kind="permission_error",
            code="adapter_management_off",
        )
    key = settings.admin_key or settings.api_key
    if key is not None:
        _check(http, key)


def _check(http: Request, *keys: str | None) -> None:
    scheme, _, given = http.headers.get("authorization", "").partition(" ")
    digest = sha256(given.strip().encode("latin-1")).digest()
    # all are compared, whichever fits
    fits = [hmac.compare_digest(digest, sha256(key.encode()).digest()) for key in keys if key is not None]
    if scheme.lower() != "bearer" or not any(fits):
        missing = "the header Authorization: Bearer KEY is missing" if not given else "this key is not the right one"
        raise ApiError(
            401,
            missing,
            kind="authentication_error",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )
