"""Keeps an optuna study in a journal: one file that several processes may share."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tnlm.errors import CheckpointError, OptionError

if TYPE_CHECKING:
    import optuna

NAME, ABOUT = "tnlm", "about"


def open_study(
    path: str | Path | None, maximize: Sequence[bool], about: Mapping[str, Any]
) -> optuna.Study:
    """Open the study in a journal, or start a new one.

    Args:
        path: the journal file; None keeps the study in memory.
        maximize: for each objective, whether higher is better.
        about: what the study depends on, as plain JSON values.

    Raises:
        OptionError: if optuna is not installed.
        CheckpointError: if the file cannot be written, is not a journal, or belongs to another
            study.

    Example:
        >>> open_study(None, [False, True], {"rank": 1}).user_attrs
        {'about': {'rank': 1}}
    """
    try:
        import optuna
    except ImportError as missing:
        raise OptionError("search needs optuna: pip install 'tnlm[search]'") from missing
    from optuna.study import StudyDirection

    directions = [StudyDirection.MAXIMIZE if m else StudyDirection.MINIMIZE for m in maximize]
    try:
        with _silent(optuna):
            study = optuna.create_study(
                storage=None if path is None else _journal(Path(path)),
                study_name=NAME,
                directions=directions,
                load_if_exists=True,
            )
        wanted = json.loads(json.dumps(about))
        found = study.user_attrs.get(ABOUT)
        if found is None:
            study.set_user_attr(ABOUT, wanted)
            found = wanted
    except OSError as error:
        raise CheckpointError(f"the journal {path} cannot be written: {error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is not the journal of a search: {error!r}") from error
    for name in {**wanted, **found}:
        if found.get(name) != wanted.get(name):
            raise CheckpointError(
                f"{path} is the journal of another search: {name} differs; "
                "use another file, or the same model, space and objectives"
            )
    return study


def _journal(path: Path) -> optuna.storages.JournalStorage:
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock

    path.parent.mkdir(parents=True, exist_ok=True)
    path.open("ab").close()  # fails before any work if it cannot be written
    lock = JournalFileSymlinkLock(str(path))
    lock.acquire()
    try:
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):  # a process was killed while writing its last line
            with path.open("rb+") as file:
                file.truncate(len(whole))
    finally:
        lock.release()
    return JournalStorage(JournalFileBackend(str(path)))


@contextmanager
def _silent(optuna: Any) -> Iterator[None]:
    """Stop optuna from announcing the study on the terminal."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)
