"""A real study under watch: `python -m examples.optuna_watch`.

Everything here but the lines that mention `sqla_signals` or `watch` is how Optuna is always used.
"""

import logging
import sys
import tempfile
from pathlib import Path

import optuna
from optuna.storages._rdb.models import BaseModel
from sqlalchemy import func, select

import sqla_signals
from examples import show
from examples.optuna_watch import watch


def objective(trial: optuna.Trial) -> float:
    """A parabola with its minimum at 2; far away from it trials are pruned or fail."""
    x = trial.suggest_float("x", -10, 10)
    trial.set_user_attr("side", "left" if x < 2 else "right")
    trial.report(abs(x - 2), step=0)
    if x > 6:
        raise optuna.TrialPruned
    if x < -6:
        raise ValueError("out of range")
    return round((x - 2) ** 2, 3)


def run_study(storage: optuna.storages.RDBStorage) -> dict[str, int]:
    """Run a small study and delete it; return the size of each table just before that."""
    study = optuna.create_study(
        study_name="parabola", storage=storage, sampler=optuna.samplers.RandomSampler(seed=1)
    )
    for x in (1.5, 8.0, -8.0):
        study.enqueue_trial({"x": x})
    study.optimize(objective, n_trials=5, catch=ValueError)
    sizes = table_sizes(storage)
    optuna.delete_study(study_name="parabola", storage=storage)
    return sizes


def table_sizes(storage: optuna.storages.RDBStorage) -> dict[str, int]:
    """Count the rows of every mapped table."""
    with storage.engine.connect() as connection:
        return {
            table.name: connection.scalar(select(func.count()).select_from(table)) or 0
            for table in BaseModel.metadata.sorted_tables
        }


def main(path: Path) -> None:
    """Watch a study in the SQLite file at `path`, and print what was heard."""
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    watch.heard.clear()
    # Optuna's upserts are its own affair.
    installation = sqla_signals.install(bulk="ignore")
    try:
        storage = optuna.storages.RDBStorage(f"sqlite:///{path}")
        show.heading("What the receivers report while Optuna works")
        sizes = run_study(storage)
        storage.remove_session()
        storage.engine.dispose()
    finally:
        installation.remove()
    show.heading("Signals by table, and the rows there were before the study was deleted")
    actions = ("created", "updated", "deleted")
    rows = [
        [table, *(watch.heard[table, action] for action in actions), size]
        for table, size in sizes.items()
        if size
    ]
    show.table(["table", *actions, "rows"], rows)
    show.line(
        "\nTrial attributes are inserted by upserts, which bypass the unit of work: no signal."
    )
    show.line("They are deleted by the unit of work, like all the rest: one signal for each row.")


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s", stream=sys.stdout)
    watch.logger.setLevel(logging.INFO)
    with tempfile.TemporaryDirectory() as directory:
        main(Path(directory, "optuna.db"))
