"""What whoever starts a server decides of its HTTP side."""

from __future__ import annotations

from dataclasses import dataclass

from turnrow.errors import UserError

__all__ = ["ServerSettings"]


@dataclass(frozen=True)
class ServerSettings:
    """Settings of the HTTP side; those of the engine are `Limits`.

    Raises:
        UserError: a value is out of range.
    """

    base_name: str
    """The base model's own name, by which it can be asked for beside ``base``."""
    api_key: str | None = None
    """Asked for by everything under ``/v1``; None lets everybody in."""
    admin_key: str | None = None
    """Asked for in place of `api_key` where adapters are loaded and unloaded; it opens everything else too."""
    manage_adapters: bool = False
    """Let adapters be loaded and unloaded also without any key. With a key they can be."""
    any_path: bool = False
    """Let adapters be loaded from outside of the adapters' folder."""
    request_timeout_s: float | None = 600.0
    """A request that takes longer, waiting included, fails; None for no limit."""
    max_body_bytes: int = 4 * 1024**2
    """A longer body is refused."""
    body_timeout_s: float = 30.0
    """A body that takes longer to come in is refused."""
    allow_origins: tuple[str, ...] = ()
    """Web pages of these origins may call the server from a browser (CORS)."""

    def __post_init__(self) -> None:
        for name in ("api_key", "admin_key"):
            if getattr(self, name) == "":
                raise UserError(f"{name} is empty: give a key, or none for no key")
        if self.request_timeout_s is not None and not 0 < self.request_timeout_s < float("inf"):
            raise UserError(
                f"request_timeout_s is {self.request_timeout_s}; it must be above 0 s, or None for no limit"
            )
        if self.max_body_bytes < 1:
            raise UserError(f"max_body_bytes is {self.max_body_bytes}; it must be at least 1")

    @property
    def managed(self) -> bool:
        """Whether adapters can be loaded and unloaded."""
        return self.manage_adapters or self.api_key is not None or self.admin_key is not None
