"""Stored responses, by whose ids later requests go on: as many as fit, and the latest ones."""

import collections
import json
from typing import Any

from pipeline.serve.errors import ApiError


class ResponseStore:
    """Holds responses with the conversation up to and with them, in at most `max_bytes` of their JSON."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._found: collections.OrderedDict[str, tuple[dict[str, Any], list[dict[str, Any]], int]]
        self._found = collections.OrderedDict()

    def put(self, response: dict[str, Any], items: list[dict[str, Any]]) -> None:
        """Stores a response and the items of its conversation, its own output at the end."""
        size = len(json.dumps([response, items]))
        self._found[response["id"]] = (response, items, size)
        self._num_bytes += size
        while self._num_bytes > self._max_bytes:
            _, (_, _, size) = self._found.popitem(last=False)
            self._num_bytes -= size

    def response(self, name: str) -> dict[str, Any]:
        """Returns a stored response; raises ApiError where there is none."""
        return self._get(name, "response_id")[0]

    def items(self, name: str | None) -> list[dict[str, Any]]:
        """Returns the items of a response's conversation, none for None; raises ApiError where there is no such one."""
        return [] if name is None else self._get(name, "previous_response_id")[1]

    def num_bytes(self, name: str | None) -> int:
        """Returns what a response takes, 0 for None; raises ApiError where there is no such one."""
        return 0 if name is None else self._get(name, "previous_response_id")[2]

    def delete(self, name: str) -> None:
        """Forgets a response; raises ApiError where there is none."""
        self._num_bytes -= self._get(name, "response_id")[2]
        del self._found[name]

    def _get(self, name: str, param: str) -> tuple[dict[str, Any], list[dict[str, Any]], int]:
        if name not in self._found:
            raise ApiError(
                f"there is no response {name!r}; this server holds the latest ones that were stored: send the whole "
                "conversation as input",
                param=param,
                code="response_not_found",
                status=404,
            )
        self._found.move_to_end(name)
        return self._found[name]
