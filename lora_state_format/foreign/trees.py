"""Values of a foreign checkpoint, whose form has to be checked."""

from __future__ import annotations

from typing import Any, TypeVar, overload

from lora_state_format.errors import FileError

__all__ = ["member"]

T = TypeVar("T")


@overload
def member(tree: Any, key: Any, kind: type[T], path: object) -> T: ...
@overload
def member(tree: Any, key: Any, kind: tuple[type, ...], path: object) -> Any: ...
def member(tree: Any, key: Any, kind: Any, path: object) -> Any:
    """Return ``tree[key]``. Raises ``FileError`` for the file ``path`` if it is missing or not of one of the types.

    A negative index is refused, and ``bool`` is not an ``int``.
    """
    try:
        if isinstance(tree, list) and key < 0:
            raise IndexError
        value = tree[key]
    except (LookupError, TypeError):
        raise FileError(f"has no {key!r} where one is expected, in a {type(tree).__name__}", path=path) from None
    if not isinstance(value, kind) or (
        isinstance(value, bool) and bool not in (kind if type(kind) is tuple else (kind,))
    ):
        kinds = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise FileError(f"{key!r} is a {type(value).__name__}, where {kinds} is expected", path=path)
    return value
