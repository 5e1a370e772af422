"""Refuse a request: an answer with a status, which says what is wrong with which field."""

from __future__ import annotations

from vaeflow.errors import VaeflowError


class RefusedError(VaeflowError):
    """A request that is not answered with a result.

    Args:
        status: the HTTP status.
        message: what is wrong, and what would be right; never the content itself.
        field: of the request, such as `images`; empty where it is not about one.
        retry_after: seconds until it is worth trying again, where it is.
    """

    def __init__(
        self, status: int, message: str, field: str = "", retry_after: int | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.field = field
        self.headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
        if status == 401:
            self.headers["WWW-Authenticate"] = "Bearer"

    def named(self) -> str:
        """Return the message with the field in it, for answers that have no place for it."""
        named = not self.field or str(self).startswith(self.field)
        return str(self) if named else f"{self.field}: {self}"

    def content(self) -> dict[str, str]:
        """Return the answer's JSON."""
        return {"error": str(self), **({"field": self.field} if self.field else {})}
