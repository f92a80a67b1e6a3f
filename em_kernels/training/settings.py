"""Base class of every command's settings, and the errors that bad settings raise."""

import difflib
import json
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

Auto = Literal["auto"]
Positive = Annotated[int, Field(ge=1)]


class UserError(Exception):
    """An error that the user can fix; its one-line message names the setting and the remedy."""


def in_one_line(error: object) -> str:
    """Return the text of an error with its line breaks replaced by spaces."""
    return " ".join(str(error).split())


class Settings(BaseModel):
    """Base class of settings: immutable, strict about names; field docstrings are the --help."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        for field in cls.model_fields.values():  # --help would keep the source's line breaks
            field.description = " ".join((field.description or "").split())

    def __init__(self, **values: Any) -> None:
        """Raises: UserError for an unknown setting, a value of the wrong kind or out of range."""
        if wrong := [name for name, value in values.items() if has_surrogates(str(value))]:
            raise UserError(f"{wrong[0]}: is not text in UTF-8")
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise UserError(_first_complaint(error, type(self))) from None

    def to_yaml(self) -> str:
        """Return every setting as YAML."""
        values = self.model_dump(mode="json")
        text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
        # YAML takes U+0085 for a line break, so text that has one is written escaped.
        return yaml.safe_dump(values, sort_keys=False) if "\x85" in text else text


def json_object(name: str, text: str) -> dict[str, Any]:
    """Parse a setting whose text is a JSON object."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise UserError(f'{name}: {text!r} is not a JSON object such as {{"name": false}}')
    return value


def has_surrogates(text: str) -> bool:
    """Return True for text that UTF-8 cannot encode."""
    return any("\ud800" <= letter <= "\udfff" for letter in text)


def _first_complaint(error: ValidationError, kind: type[Settings]) -> str:
    """Return setting, value and what is wrong; for an unknown setting the most similar one."""
    complaint, prefix = error.errors()[0], "sampling." if error.title == "Sampling" else ""
    name = prefix + ".".join(str(part) for part in complaint["loc"])
    if complaint["type"] == "extra_forbidden":
        known = {field: prefix + field for field in kind.model_fields}
        if "sampling" in known:
            inner: Any = kind.model_fields["sampling"].annotation
            known |= {field: f"sampling.{field}" for field in inner.model_fields}
        near = difflib.get_close_matches(name.split(".")[-1], known, n=1)
        hint = f"; did you mean {known[near[0]]}?" if near else ""
        return f"{name}: unknown setting{hint}"
    message = complaint["msg"]
    return f"{name}: {complaint['input']!r}: {message[:1].lower()}{message[1:]}"
