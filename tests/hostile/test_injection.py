"""Raises at random lines of the package: the model must be as it was, and nothing be left behind.

The full run: pytest tests/hostile/test_injection.py -m hostile
"""

from __future__ import annotations

import gc
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig, PreTrainedConfig

import tnlm
from tnlm.schemes import schemes

PACKAGE = str(Path(tnlm.__file__).parent)
ERRORS = [KeyboardInterrupt, RuntimeError, MemoryError, OSError]
IDS = torch.arange(256) % 61 + 3
INJECTIONS, INTERRUPTIONS = 200, 40
"""Of a full run, over all schemes and over saves."""


def arguments(scheme):
    found = schemes()[scheme]
    given = {"calibration": IDS, "max_length": 32} if found.needs_calibration else {}
    given |= {"recover_tokens": 128} if found.recover != "none" else {}
    return given | {"progress": False}


def portrait(model):
    """Everything a model is, to be compared."""

    def seen(value):
        if isinstance(value, torch.Tensor):
            grad = value.grad if value.is_leaf else None
            content = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            return (
                id(value),
                value.dtype,
                value.requires_grad,
                content,
                None if grad is None else (id(grad), grad.numpy().tobytes()),
            )
        if isinstance(value, dict):
            return id(value), {key: seen(item) for key, item in value.items()}
        if isinstance(value, PreTrainedConfig | GenerationConfig):
            return id(value), {key: seen(item) for key, item in vars(value).items()}
        if isinstance(value, bool | int | float | str | None):
            return value
        if isinstance(value, list | tuple | set):
            return type(value), [seen(item) for item in value]
        return id(value)

    named = model.named_modules(remove_duplicate=False)
    return {name: {k: seen(v) for k, v in vars(module).items()} for name, module in named}


def differences(now, before):
    """Where two portraits differ: attributes by the names of their modules."""
    names = [name for name in {**now, **before} if now.get(name) != before.get(name)]
    return [
        (name, key)
        for name in names
        for key in {**now.get(name, {}), **before.get(name, {})}
        if now.get(name, {}).get(key) != before.get(name, {}).get(key)
    ]


class Lines:
    """Traces the lines of the package; raises, or does anything else, at one of them."""

    def __init__(self, at=None, act=None, within=PACKAGE):
        self.seen = Counter()
        self._at, self._act, self._within = at, act, within

    def __enter__(self):
        sys.settrace(self._call)
        return self

    def __exit__(self, *_):
        sys.settrace(None)

    def _call(self, frame, event, _):
        inside = frame.f_code.co_filename.startswith(self._within)
        return self._line if inside else None

    def _line(self, frame, event, _):
        if event == "line":
            place = (frame.f_code.co_filename, frame.f_lineno)
            self.seen[place] += 1
            if self._at == (*place, self.seen[place]):
                self._act()
        return self._line


CHANGING = ("surgery", "pipeline", "undo", "spill", "stacks", "huggingface", "training", "adapters")


def draw(seen, generator):
    """Choose a line, every other time of what changes models, and one of the times it is run."""
    changing = [place for place in sorted(seen) if Path(place[0]).stem in CHANGING]
    place = generator.choice(generator.choice([sorted(seen), changing or sorted(seen)]))
    return (*place, generator.randint(1, seen[place]))


def raising(error):
    def act():
        raise error("injected")

    return act


@pytest.fixture
def scratch(tmp_path, monkeypatch):
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def quiet(monkeypatch):
    """Errors may also come while an object is deleted, where Python tells and forgets them."""
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)


def prepared(make_model, kind):
    """A model with what must be kept: a frozen part, a gradient, modes, a hook."""
    model = make_model(kind)
    first, *_, last = model.parameters()
    first.requires_grad_(False)
    last.grad = torch.ones_like(last)
    model.train()
    next(iter(model.children())).eval()
    model.register_forward_hook(lambda *_: None)
    return model


def compress_with_injections(scheme, kind, count, seed, make_model, scratch):
    generator = random.Random(f"{scheme}-{seed}")
    tnlm.compress(make_model(kind), scheme, **arguments(scheme))  # what is imported late is there
    with Lines() as lines:
        tnlm.compress(make_model(kind), scheme, **arguments(scheme))
    failures = []
    for _ in range(count):
        at, error = draw(lines.seen, generator), generator.choice(ERRORS)
        model = prepared(make_model, kind)
        before = portrait(model)
        try:
            with Lines(at, raising(error)):
                tnlm.compress(model, scheme, **arguments(scheme))
        except error as found:
            told = str(found)
            del found
        except tnlm.errors.TnlmError as found:  # an OSError may be put in words
            told = str(found)
            del found
        else:
            told = None
        gc.collect()
        changed = differences(portrait(model), before)
        if told is not None and changed:
            failures.append((at, error.__name__, changed))
        if list(scratch.iterdir()):
            failures.append((at, error.__name__, [p.name for p in scratch.iterdir()]))
            for path in scratch.iterdir():
                path.rename(scratch.parent / f"kept-{len(failures)}")
    return failures


@pytest.mark.parametrize("scheme", ["svd-llm", "tensorgpt"])
def test_a_few_errors_leave_the_model_as_it_was(scheme, make_model, scratch, quiet):
    assert compress_with_injections(scheme, "gpt2", 2, 0, make_model, scratch) == []


@pytest.mark.hostile
@pytest.mark.parametrize("scheme", [s for s in tnlm.list_schemes() if s != "reap"])
def test_errors_at_any_line_leave_the_model_as_it_was(scheme, make_model, scratch, quiet):
    count = -(-INJECTIONS // len(tnlm.list_schemes()))
    assert compress_with_injections(scheme, "tied-llama", count, 1, make_model, scratch) == []


# Saves


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def stage(compressed, tmp_path, word_tokenizer):
    """Saves of one model over another, and what a directory then holds."""

    class Stage:
        folder = tmp_path / "out" / "model"

        def save(self, which):
            model = compressed("tied-llama", which)
            tnlm.save(model, self.folder, tokenizer=word_tokenizer, overwrite=True)
            return files(self.folder)

        def __init__(self):
            self.new, self.old = self.save("svd"), self.save("kron")

        def problem(self):
            """What is wrong now: the files must be old or new, and alone; then the old again."""
            found = files(self.folder.parent)
            whole = [{f"model/{k}": v for k, v in kept.items()} for kept in (self.old, self.new)]
            try:
                if found not in whole or len(list(self.folder.parent.iterdir())) > 1:
                    return sorted(found)
                return None
            finally:
                self.save("kron")

    return Stage()


def save_with_injections(stage, count, seed):
    generator, failures = random.Random(seed), []
    with Lines() as lines:
        stage.save("svd")
    stage.save("kron")
    for _ in range(count):
        at, error = draw(lines.seen, generator), generator.choice(ERRORS)
        try:
            with Lines(at, raising(error)):
                stage.save("svd")
        except (error, tnlm.errors.TnlmError):
            pass
        gc.collect()
        problem = stage.problem()
        if problem:
            failures.append((at, error.__name__, problem))
    return failures


def test_a_few_errors_in_a_save_leave_old_or_new_files(stage, quiet):
    assert save_with_injections(stage, 4, 0) == []


@pytest.mark.hostile
def test_errors_at_any_line_of_a_save_leave_old_or_new_files(stage, quiet):
    assert save_with_injections(stage, INJECTIONS, 1) == []


# Ctrl-C, at any time, twice


def interrupted(work, first, second):
    """Run some work, with two interruptions; return where in the package one came, if in it."""
    delays, raised = [second], None

    def ring(*_):
        if delays:
            signal.setitimer(signal.ITIMER_REAL, delays.pop())
        signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGALRM, ring)
    try:
        try:
            signal.setitimer(signal.ITIMER_REAL, first)
            work()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except (KeyboardInterrupt, tnlm.errors.TnlmError) as error:
        raised = error
    finally:
        signal.signal(signal.SIGALRM, before)
    places = []
    while raised is not None:
        frames = traceback.extract_tb(raised.__traceback__)
        places += [(f.filename, f.lineno) for f in frames if f.filename.startswith(PACKAGE)][-1:]
        raised = raised.__context__
    return places


def measured(work):
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def compress_with_interruptions(scheme, count, make_model, scratch):
    generator, failures = random.Random(f"{scheme} interrupted"), []

    def work():
        tnlm.compress(model, scheme, **arguments(scheme))

    model = make_model("gpt2")
    work()
    model = make_model("gpt2")
    most = measured(work)
    for _ in range(count):
        model = prepared(make_model, "gpt2")
        before = portrait(model)
        delays = generator.uniform(1e-4, most), 10 ** generator.uniform(-5, -2)
        broken = interrupted(work, *delays)
        changed = differences(portrait(model), before)
        if broken and changed:
            failures.append((delays, broken, changed))
        gc.collect()
        if list(scratch.iterdir()):
            failures.append((delays, [p.name for p in scratch.iterdir()]))
    return failures


def save_with_interruptions(stage, count):
    generator, failures = random.Random("save interrupted"), []
    most = measured(lambda: stage.save("svd"))
    for _ in range(count):
        delays = generator.uniform(1e-4, most), 10 ** generator.uniform(-5, -2)
        interrupted(lambda: stage.save("svd"), *delays)
        gc.collect()
        problem = stage.problem()
        if problem:
            failures.append((delays, problem))
    return failures


@pytest.mark.hostile
@pytest.mark.parametrize("scheme", ["kron", "svd-llm", "aa-svd", "lpaf", "tensorgpt"])
def test_interruptions_leave_the_model_as_it_was(scheme, make_model, scratch, quiet):
    assert compress_with_interruptions(scheme, INTERRUPTIONS // 5, make_model, scratch) == []


@pytest.mark.hostile
def test_interruptions_of_a_save_leave_old_or_new_files(stage, quiet):
    assert save_with_interruptions(stage, INTERRUPTIONS) == []


def test_a_few_interruptions_of_a_save_leave_old_or_new_files(stage, quiet):
    assert save_with_interruptions(stage, 2) == []
