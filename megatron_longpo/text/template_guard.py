"""Chat templates run with a limit of time and memory.

A template is a program that comes with a tokenizer. Jinja's sandbox keeps it from everything outside of it, but not from running
forever or from making a text of any size.
"""

from __future__ import annotations

import ctypes
import gc
import os
import resource
import threading
from collections.abc import Callable
from pathlib import Path

from jinja2 import Environment, TemplateError

from megatron_longpo.errors import DataError

TEMPLATE_SECONDS = 10.0
# Memory that rendering may take beyond what the process has. Documents, of at most tens of megabytes, are copied a few times.
TEMPLATE_MEMORY_BYTES = 2**31
# Seconds until the exception is raised once more.
_AGAIN_SECONDS = 0.05
# The limits hold for the process, so one thread renders at a time.
_rendering = threading.Lock()


class TemplateLimitError(DataError):
    """A chat template takes too much time or memory."""


class _Expired(BaseException):
    """Raised in the rendering thread by the timer. Not an Exception, which Jinja would handle."""


def refuse_powers(source: str) -> None:
    """Refuse a template with powers: ``9 ** 9 ** 9`` is a single step that nothing can interrupt.

    Raises:
        DataError: it has one.
    """
    previous = ""
    try:
        tokens = [(kind, value) for _, kind, value in Environment(autoescape=True).lex(source) if kind != "whitespace"]
    except TemplateError:
        # Said with its reason when it is compiled.
        return
    for kind, value in tokens:
        # After a bracket or a comma it passes keywords to a macro.
        if kind == "operator" and value == "**" and previous not in ("(", ","):
            raise DataError("it computes powers (**), which no chat template needs")
        previous = value


def render_bounded(render: Callable[[], str], seconds: float, memory_bytes: int = TEMPLATE_MEMORY_BYTES) -> str:
    """Render a template within limits.

    Args:
        render: renders it.
        seconds: longest time.
        memory_bytes: most memory beyond what the process has.

    Raises:
        TemplateLimitError: it took longer, or needed too much memory.
    """
    with _rendering:
        limits = _limit_memory(memory_bytes)
        collects = gc.isenabled()
        # A collection runs callbacks that libraries have registered, and Python ignores what is raised in these: a template that
        # keeps the collector busy would never see the end of its time.
        gc.disable()
        try:
            return _render_watched(render, seconds)
        except _Expired:
            raise TemplateLimitError(
                f"the chat template takes more than {seconds:g} s; correct it, or raise template_seconds"
            ) from None
        except MemoryError:
            raise TemplateLimitError(
                f"the chat template takes more than {memory_bytes / 2**30:.3g} GiB of memory; correct it, or raise "
                "template_memory_bytes"
            ) from None
        finally:
            if collects:
                gc.enable()
            if limits is not None:
                resource.setrlimit(resource.RLIMIT_AS, limits)


def _render_watched(render: Callable[[], str], seconds: float) -> str:
    """Render in this thread, and have ``_Expired`` raised in it when the time is over."""
    ended, lock = threading.Event(), threading.Lock()
    thread = ctypes.c_ulong(threading.get_ident())
    raise_in_thread = ctypes.pythonapi.PyThreadState_SetAsyncExc

    def watch() -> None:
        # Raised again and again until rendering ends: where Python happens to be in a destructor or in another callback that
        # ignores exceptions, a single one is lost.
        wait = seconds
        while not ended.wait(wait):
            wait = _AGAIN_SECONDS
            with lock:
                if not ended.is_set():
                    raise_in_thread(thread, ctypes.py_object(_Expired))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        return render()
    finally:
        while True:
            try:
                ended.set()
                with lock:
                    # What was raised and has not arrived yet is withdrawn.
                    raise_in_thread(thread, None)
                break
            except _Expired:
                # It arrived just now. Left as it is, the watcher would raise it again and again, long after the rendering.
                continue


def _limit_memory(more: int) -> tuple[int, int] | None:
    """Limit the memory of this process to what it has and some bytes more.

    Returns:
        The limits to restore; None where the system cannot limit it, or a lower limit holds already.
    """
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        before = resource.getrlimit(resource.RLIMIT_AS)
        most = pages * os.sysconf("SC_PAGE_SIZE") + more
        if before[0] != resource.RLIM_INFINITY and before[0] <= most:
            return None
        resource.setrlimit(resource.RLIMIT_AS, (most, before[1]))
    except (OSError, ValueError):
        return None
    return before
