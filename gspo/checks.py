"""What the fields of a plan are held to, each by one line for the user that names it."""

from typing import Any

from gspo.types import UserError


def need(ok: bool, field: str, value: Any, remedy: str) -> None:
    """Raises UserError "field=value: remedy" unless `ok`."""
    if not ok:
        raise UserError(f"{field}={value!r}: {remedy}")


def positive(plan: Any, *names: str, under: str = "") -> None:
    """Raises UserError for the first of the fields that is not > 0. under: what its name begins with, "eval." say."""
    for name in names:
        value = getattr(plan, name)
        need(value > 0, under + name, value, "must be positive")


def not_negative(plan: Any, *names: str, off: str = "") -> None:
    """Raises UserError for the first of the fields that is not >= 0. off: what 0 means, for who looked for a way to
    switch it off."""
    for name in names:
        value = getattr(plan, name)
        need(value >= 0, name, value, "must not be negative" + (f" (0: {off})" if off else ""))


def one_of(field: str, value: str, known) -> None:
    need(value in known, field, value, f"choose one of {', '.join(known)}")
