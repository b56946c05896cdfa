"""Refuses settings of a Celery app under which a committed event could be lost.

The publisher itself gives whatever can be given with a message or a task (late acknowledgement,
confirms, ``mandatory``, JSON); these are the other settings. Those of the broker itself cannot be
seen from here.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ..errors import InstallError
from ..signals.signal import logger

if TYPE_CHECKING:
    from celery import Celery

TASK_OPTIONS: Final[dict[str, Any]] = {
    "acks_late": True,
    "reject_on_worker_lost": True,
    # Where a hard time limit or a crash ends a task, nobody has noted that it failed.
    "acks_on_failure_or_timeout": False,
    "ignore_result": True,
    "serializer": "json",
}
"""How the task is made; ``task_annotations`` of the app must not undo it."""

_PERSISTENT: Final = (2, "persistent")


def check(app: Celery, task: Any) -> None:
    """Check the settings of the app.

    :param task: the task that runs the messages, with the app's annotations.
    :raises InstallError: something must be set; one message says all of it.
    """
    wrong = [*_task(app, task), *_transport(app)]
    if wrong:
        raise InstallError(
            f"with these settings the Celery app {app.main!r} could lose events of durable "
            f"receivers, or keep them too long. Set:\n" + "\n".join(f"- {line}" for line in wrong)
        )


def warn_of_pickle(app: Celery) -> None:
    """Warn that messages of other tasks may hold code."""
    if {"pickle", "application/x-python-serialize"} & set(app.conf.accept_content):
        logger.warning(
            "the Celery app %r accepts pickle: who can write to its broker can run any code in its "
            "workers. Leave 'pickle' out of accept_content; ours are JSON",
            app.main,
        )


def warn_of_forgetting(app: Celery) -> None:
    """Warn that the broker forgets the messages of a worker that is killed."""
    driver = driver_of(app)
    if driver in ("filesystem", "memory"):
        logger.warning(
            "the Celery app %r has the broker %s://, which forgets the messages of a worker that "
            "is killed: good for trying things out. Use RabbitMQ or Redis for what must arrive",
            app.main,
            driver,
        )


def driver_of(app: Celery) -> str:
    """The kind of broker: ``amqp``, ``redis``, ``filesystem``, ..."""
    driver: str = app.connection_for_write().transport.driver_type
    return driver


def _task(app: Celery, task: Any) -> Iterator[str]:
    conf = app.conf
    for name, value in TASK_OPTIONS.items():
        if getattr(task, name) != value:
            yield f"no {name} for {task.name} in task_annotations; it needs {value!r}"
    if "json" not in conf.accept_content and "application/json" not in conf.accept_content:
        yield "accept_content: add 'json', which the messages are written in"
    hard = task.time_limit or conf.task_time_limit
    soft = task.soft_time_limit or conf.task_soft_time_limit
    if hard and not (soft and soft < hard):
        yield (
            f"task_soft_time_limit: less than task_time_limit ({hard:g}). A receiver that meets "
            f"the hard limit is killed, does not count as failed, and is run again for ever"
        )


def _transport(app: Celery) -> Iterator[str]:
    driver, options = driver_of(app), app.conf.broker_transport_options or {}
    if driver == "amqp":
        yield from _amqp(app)
    elif driver == "redis":
        yield from _redis(app, options)
    elif driver == "filesystem":
        yield from _filesystem(options)


def _amqp(app: Celery) -> Iterator[str]:
    if app.conf.task_default_delivery_mode not in _PERSISTENT:
        yield "task_default_delivery_mode: 2; other messages are gone when RabbitMQ restarts"
    for queue in app.amqp.queues.values():
        arguments = {**(queue.queue_arguments or {}), **(queue.exchange.arguments or {})}
        where = f"in task_queues, for the queue {queue.name!r}"
        if not queue.durable or queue.auto_delete or queue.exclusive:
            yield f"{where}: durable=True, auto_delete=False, exclusive=False"
        if queue.exchange.delivery_mode not in (None, *_PERSISTENT):
            yield f"{where}: delivery_mode=2; other messages are gone when RabbitMQ restarts"
        limited = queue.max_length or queue.max_length_bytes
        limited = limited or arguments.keys() & {"x-max-length", "x-max-length-bytes"}
        if limited and arguments.get("x-overflow") != "reject-publish":
            yield f"{where}: 'x-overflow': 'reject-publish'; a full queue drops messages otherwise"
        ends = arguments.keys() & {"x-message-ttl", "x-expires"}
        if ends or queue.message_ttl or queue.expires:
            yield f"{where}: no message_ttl and no expires; messages that wait too long are dropped"


def _redis(app: Celery, options: Any) -> Iterator[str]:
    timeout = options.get("visibility_timeout")
    hard = app.conf.task_time_limit
    if not timeout:
        yield (
            "broker_transport_options['visibility_timeout']: seconds after which another worker "
            "gets what a killed one had, an hour unless set; more than the longest receiver takes, "
            "such as 600"
        )
    elif hard and timeout <= hard:
        yield (
            f"broker_transport_options['visibility_timeout'], which is {timeout:g}: more than "
            f"task_time_limit ({hard:g}). A receiver that takes longer is run twice at once"
        )


def _filesystem(options: Any) -> Iterator[str]:
    folders = {options.get("data_folder_in"), options.get("data_folder_out")}
    if len(folders) != 1 or None in folders:
        yield (
            "broker_transport_options['data_folder_in'] and ['data_folder_out']: the same folder "
            "for the relay and the workers"
        )
    elif missing := [folder for folder in folders if not Path(str(folder)).is_dir()]:
        yield f"broker_transport_options['data_folder_in']: there is no folder {missing[0]}"
