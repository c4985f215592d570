"""Limits and access of the reward server."""

from __future__ import annotations

import ipaddress
import socket
from dataclasses import dataclass, field

from cme_reward.errors import ConfigError

TOKEN_VARIABLE = "CME_SERVER_TOKEN"


@dataclass(frozen=True)
class ServerSettings:
    """What the server accepts, and from whom.

    Raises:
        ConfigError: for a limit that lets nothing through, or a token that no header can carry.
    """

    token: str | None = field(default=None, repr=False)
    """Clients must send it, as `Authorization: Bearer TOKEN` or as the password of a URL. None:
    everyone who reaches the port is served."""

    max_requests: int = 4096
    """Scoring requests held at a time; more are answered 429. Trainers send a whole rollout batch
    at once."""

    max_body_bytes: int = 16 * 2**20
    """Longer request bodies are answered 413."""

    max_held_bytes: int = 256 * 2**20
    """Bytes of request bodies held at a time; more are answered 429."""

    client_seconds: float = 60.0
    """A client must have sent its request by then (408), and must go on reading its reply."""

    drain_seconds: float = 120.0
    """How long a server that was told to stop works on what it has accepted."""

    def __post_init__(self) -> None:
        for name in ("max_requests", "max_body_bytes", "client_seconds"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name}={getattr(self, name)!r}: expected more than 0")
        if self.max_held_bytes < self.max_body_bytes:
            raise ConfigError(
                f"max_held_bytes={self.max_held_bytes} is less than max_body_bytes="
                f"{self.max_body_bytes}: no request of that size would ever be accepted"
            )
        if not self.drain_seconds >= 0:
            raise ConfigError(f"drain_seconds={self.drain_seconds!r}: expected 0 or more")
        if self.token is not None and not (
            self.token.isascii() and self.token.isprintable() and " " not in self.token
        ):
            raise ConfigError(
                f"the token in {TOKEN_VARIABLE} holds a space or a character that a header cannot "
                "carry; expected printable ASCII, such as the output of `openssl rand -hex 32`"
            )
        if self.token == "":
            raise ConfigError(
                f"{TOKEN_VARIABLE} is set and empty; expected a token, or the variable unset"
            )


def check_host(host: str, token: str | None, allow_anonymous: bool) -> None:
    """Refuses to serve everyone on a network by mistake.

    Raises:
        ConfigError: for a host that does not resolve, or one that other machines reach, without a
            token and without having asked for that.
    """
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"--host {host!r} cannot be resolved: {error}") from error
    addresses = {str(entry[4][0]).partition("%")[0] for entry in found}
    public = sorted(a for a in addresses if not ipaddress.ip_address(a).is_loopback)
    if public and token is None and not allow_anonymous:
        raise ConfigError(
            f"--host {host!r} is {', '.join(public)}: whoever reaches this machine could use the "
            f"server. Set {TOKEN_VARIABLE} to a secret that clients then send, or ask for it with "
            "--allow-anonymous, or keep the default, 127.0.0.1"
        )
