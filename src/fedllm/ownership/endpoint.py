"""Ask a model behind an OpenAI-style endpoint; nothing but the standard library."""

from __future__ import annotations

import http
import http.client
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from fedllm.errors import ConfigError, ResourceError

# The name of the environment variable with the endpoint's key: on the command line others could read it.
KEY_VARIABLE = "FEDLLM_ENDPOINT_KEY"
_MAX_ANSWER_BYTES = 2**20


@dataclass(frozen=True)
class Endpoint:
    """A suspect model that can only be asked, at `URL/v1/completions`. Calling it asks; see `triggers.Ask`.

    Args:
        url: `http://...` or `https://...`; what follows `/v1` may be left out.
        model: The name that the endpoint gives to it.
        max_tokens: Longest answer.
        timeout_s: For one question.
    """

    url: str
    model: str = "default"
    max_tokens: int = 48
    timeout_s: float = 60.0

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError("BAD_VALUE", f"{self.url!r} is no http or https address", where="--endpoint")

    @property
    def address(self) -> str:
        """Where questions go."""
        base = self.url.rstrip("/").removesuffix("/completions").removesuffix("/v1")
        return f"{base}/v1/completions"

    def __call__(self, prompts: Sequence[str]) -> list[str]:
        """Return what the model writes after each prompt, one question after another, without sampling.

        Args:
            prompts: The texts.

        Raises:
            ResourceError: `ENDPOINT_FAILED`; no part of an answer is in its text.
        """
        return [self._asked(prompt) for prompt in prompts]

    def _asked(self, prompt: str) -> str:
        body = {"model": self.model, "prompt": prompt, "max_tokens": self.max_tokens, "temperature": 0}
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY_VARIABLE):
            headers["Authorization"] = f"Bearer {key}"
        try:
            status, answer = self._exchanged(json.dumps(body).encode(), headers)
        except (OSError, http.client.HTTPException) as error:
            raise self._failed(f"no answer: {type(error).__name__}") from None
        # A redirect is not followed: it could name another host.
        if status != http.HTTPStatus.OK:
            raise self._failed(f"it answers with status {status}")
        try:
            text = json.loads(answer)["choices"][0]["text"]
        except (ValueError, KeyError, IndexError, TypeError):
            text = None
        if not isinstance(text, str):
            raise self._failed("the answer is not in the form of /v1/completions")
        return text

    def _exchanged(self, body: bytes, headers: dict[str, str]) -> tuple[int, bytes]:
        parts = urlsplit(self.address)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        line = kind(parts.hostname or "", parts.port, timeout=self.timeout_s)
        try:
            line.request("POST", parts.path, body, headers)
            answer = line.getresponse()
            return answer.status, answer.read(_MAX_ANSWER_BYTES)
        finally:
            line.close()

    def _failed(self, what: str) -> ResourceError:
        fix = f"check address and model's name; a key goes into the environment variable {KEY_VARIABLE}"
        return ResourceError("ENDPOINT_FAILED", what, where=self.address, fix=fix)
