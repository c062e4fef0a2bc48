"""Making actors of plain classes, and waiting for them: every wait has a deadline, and what comes out of it is the actor's own error
or one of two kinds of ours.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterable, Mapping
from typing import Any, TypeVar

import ray
from ray.exceptions import RayError, RayTaskError

from webdancer.errors import StalledError, WebDancerError
from webdancer.tools.keys import drop_keys

Result = TypeVar("Result")


class ActorLost(WebDancerError):
    """The actor, its process or its node is gone; the call may or may not have been executed."""


def spawn(plain: type, options: Mapping[str, Any], *arguments: Any, **settings: Any) -> Any:
    """A handle on an actor of the class; `options` are Ray's. A class may have CALLS_ASIDE: {group: number of its threads}, and KEYS: the
    API keys that it uses; its process has no others."""
    aside = getattr(plain, "CALLS_ASIDE", None)
    make: Any = ray.remote(concurrency_groups=aside) if aside else ray.remote  # type: ignore[call-overload]  # a key that Ray's types lack
    actor_class: Any = make(_with_its_keys(plain))
    return actor_class.options(**options).remote(*arguments, **settings)


def _with_its_keys(plain: type) -> type:
    """Every process of a cluster starts with the environment of its node, keys and all."""
    initialise: Any = plain.__init__  # type: ignore[misc]
    keep = tuple(getattr(plain, "KEYS", ()))

    def __init__(self: Any, *arguments: Any, **settings: Any) -> None:
        drop_keys(keep=keep)
        initialise(self, *arguments, **settings)

    return type(plain.__name__, (plain,), {"__init__": __init__, "__module__": plain.__module__, "__qualname__": plain.__qualname__})


def kill(actor: Any) -> None:
    """At once and for good."""
    ray.kill(actor, no_restart=True)


def restart(actor: Any) -> None:
    """Kill its process; Ray starts it anew where it was made with max_restarts."""
    ray.kill(actor, no_restart=False)


async def answer(reference: Awaitable[Result], *, stage: str, timeout_s: float | None) -> Result:
    """The result of a remote call.

    Raises what the actor raised, ActorLost when it died, StalledError naming the stage after `timeout_s` (None: only where another
    deadline watches). A caller that is cancelled cancels the remote call as well.
    """
    deadline = asyncio.timeout(timeout_s)
    try:
        async with deadline:
            return await reference
    except RayTaskError as error:
        raise _original(error) from None
    except RayError as error:  # all others are Ray's own: the actor, its process, node, memory, disk or the way to it is gone
        raise ActorLost(f"{stage}: {_first_line(error)}") from error
    except TimeoutError as error:
        if not deadline.expired():
            raise
        _cancel(reference)
        raise StalledError(f"{stage}: no answer within {timeout_s:g} s") from error
    except asyncio.CancelledError:
        _cancel(reference)
        raise


async def answers(references: Iterable[Awaitable[Result]], *, stage: str, timeout_s: float | None) -> list[Result]:
    """All results in order, or the first error; then nobody waits for the others any more."""
    waiting = [asyncio.ensure_future(answer(reference, stage=stage, timeout_s=timeout_s)) for reference in references]
    try:
        return list(await asyncio.gather(*waiting))
    finally:
        for one in waiting:
            one.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)


def _cancel(reference: Awaitable[Any]) -> None:
    if isinstance(reference, ray.ObjectRef):
        ray.cancel(reference, force=False, recursive=False)


def _original(error: RayTaskError) -> BaseException:
    cause: object = error.cause
    return cause if isinstance(cause, BaseException) else error


def _first_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"
