"""Any server with OpenAI's chat completions as an engine, with patient retries."""

from __future__ import annotations

import email.utils
import math
import os
import random
import re
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from typing_extensions import override

from megatron_longpo.engines.base import MODEL_ROPE, Engine, EngineError, Prompt, Reply, Rope, Sampling
from megatron_longpo.engines.http_client import Client, Permanent, Temporary
from megatron_longpo.engines.settings import EngineConfig
from megatron_longpo.errors import ConfigError
from megatron_longpo.runtime.log import log
from megatron_longpo.runtime.reading import parse_json
from megatron_longpo.text.chat import load_tokenizer
from megatron_longpo.text.template_kwargs import parse_template_kwargs

# Temporary failures: too many requests, or a server that is starting, overloaded or briefly gone.
_TEMPORARY = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
_OK = 200
_WRONG_KEY = (401, 403)
# A prompt that is too long: the first status, or one of the others with a body that says so.
_TOO_LARGE = 413
_BAD_REQUEST = (400, 422)
_TOO_LONG = re.compile(
    r"context|too long|too large|maximum.{0,40}(?:length|tokens)|length.{0,40}exceed|exceed.{0,40}(?:length|tokens)",
    re.I,
)
# The first retry waits up to twice this long; each further one up to twice as long as the one before.
_BASE_PAUSE_SECONDS = 0.25
_LONGEST_PAUSE_SECONDS = 60.0
# Shorter waits are not logged.
_LOGGED_PAUSE_SECONDS = 1.0
# No prompt or answer has more tokens; larger counts are not believed.
_MOST_TOKENS = 10**9


class OpenAIEngine(Engine):
    """Any server with OpenAI's chat completions, over HTTP.

    Requests that fail for a reason that may pass (connection, time-out, 429, 5xx, a truncated body) are repeated after growing
    random pauses; a ``Retry-After`` holds back all requests. The key comes from the environment and is never written down: it is
    removed from what the server sends back before that is shown or kept.

    Args:
        config: server, model, tokenizer and limits.

    Raises:
        ConfigError: the key has characters that no key has.
        DataError: the tokenizer cannot be loaded.
    """

    def __init__(self, config: EngineConfig) -> None:
        assert config.model is not None and config.tokenizer is not None
        self.tokenizer = load_tokenizer(
            config.tokenizer,
            config.chat_template,
            template_seconds=config.template_seconds,
            template_memory_bytes=config.template_memory_bytes,
            template_kwargs=parse_template_kwargs(config.chat_template_kwargs),
        )
        self.thinking = config.thinking
        self.groups_at_once = config.concurrency
        self.retried = 0
        self._config = config
        self._url = config.base_url.rstrip("/") + "/chat/completions"
        self._key = os.environ.get(config.api_key_variable)
        if self._key is not None and not (self._key.isascii() and self._key.isprintable()):
            raise ConfigError(
                f"{config.api_key_variable} holds characters that no key has (a line break?); set the variable again"
            )
        self._client = Client(
            self._url,
            self._key,
            wait_seconds=config.timeout_seconds,
            total_seconds=config.request_seconds or 2 * config.timeout_seconds,
            max_bytes=config.max_reply_bytes,
        )
        if self._client.scrub(self._url) != self._url:
            raise ConfigError(
                f"base_url holds the key of {config.api_key_variable}, and is written into files; leave it out, the key is sent "
                "in a header"
            )
        self._pool = ThreadPoolExecutor(config.concurrency)
        # When the server accepts requests again, on the monotonic clock; shared by all threads.
        self._not_before = 0.0
        self._lock = threading.Lock()

    @property
    def identity(self) -> dict[str, Any]:
        return {
            "engine": "openai",
            "base_url": self._config.base_url,
            "model": self._config.model,
            "template": self.tokenizer.template_hash,
            **self.given_settings,
        }

    def answer(
        self,
        groups: Sequence[Sequence[Prompt]],
        sampling: Sampling,
        rope: Rope = MODEL_ROPE,
    ) -> list[list[Reply]]:
        assert rope.is_default
        waiting = [[self._pool.submit(self._ask, prompt, sampling) for prompt in group] for group in groups]
        try:
            return [[future.result() for future in group] for group in waiting]
        except BaseException:
            for group in waiting:
                for future in group:
                    future.cancel()
            raise

    @override
    def check_ready(self) -> None:
        """Ask for one token: that shows whether address, key and model are right."""
        sampling = Sampling(1)
        body = self._body(Prompt(({"role": "user", "content": "Hello"},)), sampling)
        self._send({**body, "max_tokens": 1}, sampling)

    def _ask(self, prompt: Prompt, sampling: Sampling) -> Reply:
        return self._send(self._body(prompt, sampling), sampling)

    def _body(self, prompt: Prompt, sampling: Sampling) -> dict[str, Any]:
        """The request."""
        body: dict[str, Any] = {
            "model": self._config.model,
            # The interface cannot begin an answer.
            "messages": list(prompt.with_prefix_in_question.messages),
            "max_tokens": self.token_limit(sampling),
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": prompt.seed,
            "stream": False,
        }
        if self.tokenizer.template_kwargs:
            # As vLLM and SGLang take them.
            body["chat_template_kwargs"] = dict(self.tokenizer.template_kwargs)
        return body

    def _send(self, body: dict[str, Any], sampling: Sampling) -> Reply:
        """Send a request until it is answered.

        Raises:
            EngineError: the server refuses every request, or gives no answer.
        """
        problem = ""
        for attempt in range(self._config.retries + 1):
            if attempt:
                with self._lock:
                    self.retried += 1
                # Full jitter: clients that failed together do not return together.
                pause = min(_LONGEST_PAUSE_SECONDS, _BASE_PAUSE_SECONDS * 2**attempt)
                time.sleep(random.uniform(0.2, 1.0) * pause)
            while (pause := self._not_before - time.monotonic()) > 0:
                # Checked again after the pause: another thread may have been told to wait longer.
                time.sleep(pause)
            reply, problem = self._try(body, sampling)
            if reply is not None:
                return reply
        raise EngineError(
            f"{self._url}: no answer after {self._config.retries + 1} tries (the last: {problem}); check the server, or raise "
            "retries. Answers so far are kept: rerun the same command to resume"
        )

    def _try(self, body: dict[str, Any], sampling: Sampling) -> tuple[Reply | None, str]:
        """Send one request: a reply, or None and the problem if that may pass."""
        try:
            answer = self._client.post(body)
        except Permanent as error:
            raise EngineError(f"{self._url}: {error}") from None
        except Temporary as error:
            return None, str(error)
        if answer.status in _TEMPORARY:
            self._heed(answer.retry_after, answer.date)
            return None, f"status {answer.status}"
        if answer.status != _OK:
            return self._refusal(answer.status, answer.text), ""
        try:
            return self._parse(parse_json(answer.text), body, sampling), ""
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            return None, f"a body that is not a completion ({type(error).__name__})"

    def _refusal(self, status: int, text: str) -> Reply:
        """The reply to a prompt that this server will never accept.

        Raises:
            EngineError: the server refuses every prompt.
        """
        detail = self._client.shown(text)
        if status == _TOO_LARGE or (status in _BAD_REQUEST and _TOO_LONG.search(text)):
            return Reply(text="", finished=False, prompt_tokens=0, new_tokens=0, refused=f"status {status}: {detail}")
        if status in _WRONG_KEY:
            fix = f"set {self._config.api_key_variable}"
        else:
            fix = "check base_url and model; base_url usually ends with /v1"
        raise EngineError(f"{self._url}: status {status} ({detail}); {fix}")

    def _parse(self, content: Any, body: dict[str, Any], sampling: Sampling) -> Reply:
        choice = content["choices"][0]
        message, reason = choice["message"], choice.get("finish_reason")
        # Null where the model wrote nothing, called a tool, or was cut while it thought.
        words = self._client.scrub(_text(message["content"]))
        # Thinking, where the server parts it from the answer itself; newer versions of vLLM call it "reasoning".
        apart = self._client.scrub(_text(message.get("reasoning_content")) or _text(message.get("reasoning")))
        usage = content.get("usage") or {}
        prompt_tokens, new_tokens = (_tokens(usage.get(name)) for name in ("prompt_tokens", "completion_tokens"))
        if prompt_tokens is None or new_tokens is None:
            # This server does not count, or not in earnest, and the length limit of short rows needs the numbers.
            prompt_tokens = len(self.tokenizer.prompt(body["messages"]))
            new_tokens = sum(self.tokenizer.count([apart + words]))
        # Other reasons, such as "length" and "content_filter", mean that the answer was cut.
        finished = reason in (None, "stop")
        reply = self.reply(
            words,
            sampling,
            finished=finished,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            # What is finished without a closing mark is an answer: the server may keep thinking to itself.
            opened=self.opens_thinking and not apart and not finished,
        )
        if apart:
            reply = replace(reply, thinking_tokens=sum(self.tokenizer.count([apart])))
        elif not reply.thinking_tokens and isinstance(details := usage.get("completion_tokens_details"), dict):
            reply = replace(reply, thinking_tokens=_tokens(details.get("reasoning_tokens")) or 0)
        refusal = _text(message.get("refusal"))
        if reason == "content_filter" or refusal:
            reply = replace(reply, declined=self._client.shown(refusal) or "content filter")
        return reply

    def _heed(self, retry_after: str | None, date: str | None) -> None:
        """Hold back all requests for as long as the server asks: seconds, or a date by the server's own clock."""
        if not retry_after:
            return
        try:
            seconds = float(retry_after)
        except ValueError:
            try:
                # This machine's clock may differ from the server's. Without a date of its own, the usual pause follows.
                until_date, now = (
                    email.utils.parsedate_to_datetime(text).timestamp() for text in (retry_after, date or "")
                )
                seconds = until_date - now
            except (TypeError, ValueError, OverflowError, IndexError):
                return
        if not math.isfinite(seconds):
            return
        pause = min(max(0.0, seconds), self._config.retry_after_seconds)
        with self._lock:
            until = time.monotonic() + pause
            # The first of the threads that are held back logs it.
            if pause >= _LOGGED_PAUSE_SECONDS and self._not_before < time.monotonic():
                asked = (
                    f"{seconds:.0f} s" if seconds <= pause else f"{seconds:.4g} s, of which {pause:.0f} s are granted"
                )
                log(f"{self._url}: the server asks to wait {asked} (Retry-After)")
            self._not_before = max(self._not_before, until)


def _text(value: Any) -> str:
    """A text that a server may leave out."""
    return value if isinstance(value, str) else ""


def _tokens(value: Any) -> int | None:
    """A server's count of tokens, or None if it is missing or not a plausible number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= _MOST_TOKENS:
        return None
    return int(value)
