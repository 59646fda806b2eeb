"""Any server with OpenAI's chat completions as an engine: requests made again, with pauses, as long as that may help."""

from __future__ import annotations

import email.utils
import json
import math
import os
import random
import re
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from megatron_longpo.engines.base import MODEL_ROPE, Engine, EngineError, Prompt, Reply, Rope, Sampling
from megatron_longpo.engines.settings import EngineConfig
from megatron_longpo.errors import ConfigError
from megatron_longpo.text.chat import load_tokenizer

# What may pass: too many requests, a server that is starting, overloaded or gone for a moment.
_PASSING = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
_LONGEST_PAUSE = 60.0
_TOO_LONG = re.compile(
    r"context|too long|too large|maximum.{0,40}(?:length|tokens)|length.{0,40}exceed|exceed.{0,40}(?:length|tokens)",
    re.I,
)


class OpenAIEngine(Engine):
    """Any server with OpenAI's chat completions, over HTTP.

    Requests that fail for a reason that may pass (connection, time-out, 429, 5xx, a body cut short) are made again with
    growing random pauses; a ``Retry-After`` is honoured, by all requests. The key comes from the environment and is
    written nowhere.

    Args:
        config: server, model, tokenizer, limits.

    Raises:
        DataError: no tokenizer there.
    """

    def __init__(self, config: EngineConfig) -> None:
        import requests

        assert config.model is not None and config.tokenizer is not None
        self.tokenizer = load_tokenizer(config.tokenizer, config.chat_template)
        self.groups_at_once = config.concurrency
        self._config = config
        self._url = config.base_url.rstrip("/") + "/chat/completions"
        key = os.environ.get(config.api_key_variable)
        if key is not None and not (key.isascii() and key.isprintable()):
            raise ConfigError(f"{config.api_key_variable} holds characters that no key has; set it again")
        self._key = key
        self._sessions = threading.local()
        self._new_session: Callable[[], Any] = requests.Session
        self._pool = ThreadPoolExecutor(config.concurrency)
        # All wait where the server asks one to.
        self._not_before = 0.0
        self._lock = threading.Lock()
        self.retried = 0

    @property
    def identity(self) -> dict[str, Any]:
        return {
            "engine": "openai",
            "base_url": self._config.base_url,
            "model": self._config.model,
            "template": self.tokenizer.template_hash,
        }

    def answer(
        self,
        groups: Sequence[Sequence[Prompt]],
        sampling: Sampling,
        rope: Rope = MODEL_ROPE,
    ) -> list[list[Reply]]:
        assert rope.is_default
        waiting = [[self._pool.submit(self._ask, p, sampling) for p in group] for group in groups]
        try:
            return [[future.result() for future in group] for group in waiting]
        except BaseException:
            for group in waiting:
                for future in group:
                    future.cancel()
            raise

    def _ask(self, prompt: Prompt, sampling: Sampling) -> Reply:
        messages = list(prompt.messages)
        if prompt.prefix:
            # This interface has no beginning of an answer; RULER puts it at the end of the question too.
            messages[-1] = {**messages[-1], "content": messages[-1]["content"] + prompt.prefix}
        body = {
            "model": self._config.model,
            "messages": messages,
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": prompt.seed,
            "stream": False,
        }
        trouble = ""
        for attempt in range(self._config.retries + 1):
            if attempt:
                with self._lock:
                    self.retried += 1
                # Full jitter: clients that failed together do not come back together.
                time.sleep(random.uniform(0.2, 1.0) * min(_LONGEST_PAUSE, 0.25 * 2**attempt))
            while (pause := self._not_before - time.monotonic()) > 0:
                # Another thread may be asked for a longer pause meanwhile.
                time.sleep(pause)
            reply, trouble = self._try(body)
            if reply is not None:
                return reply
        raise EngineError(
            f"{self._url}: no answer after {self._config.retries + 1} tries (the last: {trouble}); see to the server, or raise "
            "retries; what was answered is kept, the same command goes on"
        )

    def _sign(self, request: Any) -> Any:
        # As requests' own authentication, so that no .netrc takes the key's place.
        if self._key:
            request.headers["Authorization"] = f"Bearer {self._key}"
        return request

    def _try(self, body: dict[str, Any]) -> tuple[Reply | None, str]:
        """A reply, or what went wrong in a way that may pass."""
        import requests

        session = getattr(self._sessions, "session", None)
        if session is None:
            session = self._sessions.session = self._new_session()
        try:
            timeout = (10.0, self._config.timeout_seconds)
            answer = session.post(self._url, json=body, auth=self._sign, timeout=timeout)
            # JSON is UTF-8, whatever the headers leave out.
            status, text = answer.status_code, answer.content.decode("utf-8", errors="replace")
        except (requests.exceptions.InvalidURL, requests.exceptions.InvalidSchema, ValueError) as error:
            raise EngineError(f"{self._url}: is no address ({type(error).__name__}); look at base_url") from None
        except (requests.RequestException, OSError) as error:
            # A connection that failed is not used again.
            self._sessions.session = None
            return None, type(error).__name__
        if status in _PASSING:
            self._heed(answer.headers.get("Retry-After"))
            return None, f"status {status}"
        if status != 200:
            detail = " ".join(text.split())[:300]
            if status == 413 or (status in (400, 422) and _TOO_LONG.search(text)):
                # This prompt will not do, whatever is tried.
                return Reply("", False, 0, 0, refused=f"status {status}: {detail}"), ""
            fix = (
                f"set {self._config.api_key_variable}"
                if status in (401, 403)
                else "look at base_url and model; base_url usually ends with /v1"
            )
            raise EngineError(f"{self._url}: status {status} ({detail}); {fix}")
        try:
            content = json.loads(text)
            choice = content["choices"][0]
            words = choice["message"]["content"]
            if not isinstance(words, str):
                words = ""
            used = content.get("usage") or {}
            read, wrote = used.get("prompt_tokens"), used.get("completion_tokens")
            if read is None or wrote is None:
                # A server that does not count: the limit of the short rows needs it.
                read, wrote = len(self.tokenizer.prompt(body["messages"])), self.tokenizer.count([words])[0]
            # "length" and "content_filter" are answers cut off.
            finished = choice.get("finish_reason") in (None, "stop")
            return Reply(words.strip(), finished, int(read), int(wrote)), ""
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
            self._sessions.session = None
            return None, f"a body that is no completion ({type(error).__name__})"

    def _heed(self, retry_after: str | None) -> None:
        if not retry_after:
            return
        try:
            seconds = float(retry_after)
        except ValueError:
            try:
                seconds = email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time()
            except (TypeError, ValueError, OverflowError):
                return
        if not math.isfinite(seconds):
            return
        with self._lock:
            self._not_before = max(self._not_before, time.monotonic() + min(max(0.0, seconds), 10 * _LONGEST_PAUSE))
