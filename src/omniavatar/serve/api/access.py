"""Who calls: API keys, their scopes and rates."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request

from omniavatar.serve.api.errors import LIMITED, ApiError
from omniavatar.serve.jobs.keys import SCOPES, KeyStore
from omniavatar.serve.jobs.rates import Rates
from omniavatar.serve.jobs.records import LOCAL_KEY, KeyLimits
from omniavatar.serve.settings import ServeSettings

READ, WRITE, ADMIN = SCOPES
AUDIT = "omniavatar.serve.api.access"
"""Name of the audit log's logger."""
_LOOK_AGAIN_S = 5.0
_audit = logging.getLogger(AUDIT)


@dataclass(frozen=True)
class Caller:
    """The key of a request. key_id: owner of its jobs."""

    key_id: str
    name: str
    scopes: frozenset[str]
    limits: KeyLimits


class Access:
    """Finds the caller of a request and counts its requests.

    needs_keys: whether requests without a key are refused. Once a key exists, also a revoked one, they are.
    """

    def __init__(
        self,
        settings: ServeSettings,
        keys: KeyStore,
        rates: Rates,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings, self._keys, self._rates, self._clock = settings, keys, rates, clock
        self._needs_keys = not settings.is_loopback and not settings.insecure
        self._look_again = 0.0

    def needs_keys(self) -> bool:
        """Raises StoreError."""
        if not self._needs_keys and self._clock() >= self._look_again:
            self._needs_keys = bool(self._keys.list())
            self._look_again = self._clock() + _LOOK_AGAIN_S
        return self._needs_keys

    def caller(self, request: Request, scope: str) -> Caller:
        """Raises ApiError, StoreError."""
        address = request.client.host if request.client else "unknown"
        if not self.needs_keys():
            caller = Caller(LOCAL_KEY, LOCAL_KEY, frozenset(SCOPES), KeyLimits())
        else:
            kind, _, token = request.headers.get("authorization", "").partition(" ")
            key = self._keys.verify(token.strip()) if kind.lower() == "bearer" else None
            if key is None:
                audit(request, "refused", reason="no valid key")
                raise ApiError(
                    401,
                    "invalid_api_key",
                    "this server needs a valid API key; send Authorization: Bearer KEY",
                    type="authentication_error",
                    headers={"WWW-Authenticate": "Bearer"},
                )
            caller = Caller(key.id, key.name, key.scopes, key.limits)
        request.state.caller = caller
        if scope not in caller.scopes and ADMIN not in caller.scopes:
            audit(request, "refused", reason=f"no scope {scope}")
            message = f"this key lacks the scope {scope}; use another key"
            raise ApiError(403, "missing_scope", message, type="permission_error")
        rate = caller.limits.requests_per_minute or self._settings.requests_per_minute
        who = address if caller.key_id == LOCAL_KEY else caller.key_id
        if not self._rates.hit(who, rate):
            message = f"more than {rate} requests in a minute; wait and try again"
            raise ApiError(429, "rate_limited", message, type=LIMITED, headers={"Retry-After": "5"})
        return caller


def audit(request: Request, action: str, **values: Any) -> None:
    """Write one line of the audit log."""
    caller = getattr(request.state, "caller", None)
    record: Mapping[str, Any] = {
        "action": action,
        "key": getattr(caller, "key_id", None),
        "key_name": getattr(caller, "name", None),
        "address": request.client.host if request.client else None,
        **values,
    }
    _audit.info(action, extra={"values": record})
