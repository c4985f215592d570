"""Every exception that cme_reward raises on purpose.

CMEError
├── ConfigError     (ValueError)    a setting that does not exist or cannot hold
├── InputError      (ValueError)    prompts, ids, masks or shapes that do not fit together
├── TokenizerError  (ValueError)    a tokenizer whose text cannot be placed exactly
└── VerifierError   (RuntimeError)  a verifier that cannot be loaded, or answers wrongly
"""

from __future__ import annotations


class CMEError(Exception):
    """Base of all errors raised by this package."""


class ConfigError(CMEError, ValueError):
    """A setting has an unknown name or an impossible value."""


class InputError(CMEError, ValueError):
    """Prompts, token ids, masks or shapes do not fit together."""


class TokenizerError(CMEError, ValueError):
    """A tokenizer cannot be used, or its text cannot be placed exactly."""


class VerifierError(CMEError, RuntimeError):
    """A verifier cannot be loaded, or returned something that is not a log-probability."""
