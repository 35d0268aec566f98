"""One process of a search: draws configurations, measures them, and records the results."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tnlm.errors import EvaluationError, OptionError, TnlmError
from tnlm.studies.design.configuration import DENSE, Configuration
from tnlm.studies.design.front import Front, Point
from tnlm.studies.design.space import DesignSpace
from tnlm.studies.design.variants import Variants
from tnlm.studies.scores import ModelScore, named_scores

if TYPE_CHECKING:
    import optuna

POPULATION = 16
"""Configurations per generation of NSGA-II."""
SAME = 4
"""An objective with one value at this many configurations does not depend on them."""
SPREAD = 1_000_003
"""Separates the seeds of one search from those of another."""
RANDOM = "random"
CONFIGURATION, ERROR = "configuration", "error"


class Worker:
    """Runs trials of a search; the study holds those of all processes."""

    def __init__(
        self,
        study: optuna.Study,
        space: DesignSpace,
        variants: Variants,
        objectives: Mapping[str, ModelScore | str],
    ) -> None:
        self._study, self._space, self._variants = study, space, variants
        self._objectives = objectives

    @property
    def finished(self) -> int:
        """How many trials were measured or failed, without those of stopped processes."""
        return len(self._recorded())

    def _recorded(self) -> list[optuna.trial.FrozenTrial]:
        trials = self._study.get_trials(deepcopy=False)
        return [t for t in trials if t.state.is_finished() and CONFIGURATION in t.user_attrs]

    def seen(self) -> dict[str, list[float] | str]:
        """Return the values of each configuration, or why it failed, by key."""
        return {
            _configuration(trial).key: trial.user_attrs[ERROR]
            if ERROR in trial.user_attrs
            else list(trial.values or ())
            for trial in self._recorded()
        }

    def _repeated(self) -> bool:
        """Whether the last configuration was a repetition."""
        keys = [_configuration(trial).key for trial in self._recorded()]
        return bool(keys) and keys[-1] in keys[:-1]

    def pending(self, wanted: Sequence[Configuration]) -> Configuration | None:
        """Return the first configuration that no process has measured or is measuring."""
        seen = self.seen()
        running = [trial.params for trial in self._running()]
        for configuration in wanted:
            if configuration.key in seen:
                continue
            if _parameters(self._space, configuration) not in running:
                return configuration
        return None

    def _running(self) -> list[optuna.trial.FrozenTrial]:
        """Return the trials of other processes, or of processes that were stopped."""
        from optuna.trial import TrialState

        return self._study.get_trials(deepcopy=False, states=[TrialState.RUNNING])

    def one(self, wanted: Configuration | None, sampler: str, seed: int) -> None:
        """Run one trial: take or draw a configuration, measure it unless known, and record it."""
        from optuna.trial import TrialState

        if wanted is not None:
            self._study.enqueue_trial(_parameters(self._space, wanted))
        seen = self.seen()
        if self._repeated():  # the sampler is stuck: give it something new to start from
            sampler = RANDOM
        # One sampler per trial, so that no state is lost with a process and no two draw alike.
        number = len(self._recorded()) + len(self._running())
        self._study.sampler = _sampler(sampler, (seed * SPREAD + number) % 2**32)
        trial = self._study.ask()
        try:
            configuration = _draw(self._space, trial)
            found = seen.get(configuration.key)
            if found is None:
                found = self._measure(configuration)
            if isinstance(found, str) and configuration.is_dense:
                raise EvaluationError(f"the dense model cannot be measured: {found}")
        except BaseException:
            self._study.tell(
                trial, state=TrialState.FAIL
            )  # not recorded, so that it is tried again
            raise
        trial.set_user_attr(CONFIGURATION, configuration.to_dict())
        if isinstance(found, str):
            trial.set_user_attr(ERROR, found)
            self._study.tell(trial, state=TrialState.FAIL)
            return
        self._study.tell(trial, found)
        self._check_constant()

    def _measure(self, configuration: Configuration) -> list[float] | str:
        cost = self._space.cost(configuration)
        values: list[float] = []
        try:
            with self._variants.applied(configuration) as model:
                for name, objective in self._objectives.items():
                    if isinstance(objective, str):
                        values.append(float(getattr(cost, objective)))
                        continue
                    found = named_scores(model, objective, name)
                    if list(found) != [name]:
                        raise OptionError(
                            f"objective {name!r} returned {list(found)}; it must return one number"
                        )
                    values.append(found[name])
        except EvaluationError as error:
            return str(error)
        except TnlmError as error:
            if isinstance(error, OptionError):
                raise
            return f"{type(error).__name__}: {error}"
        return values

    def _check_constant(self) -> None:
        """Raise `EvaluationError` if an objective does not depend on the configuration."""
        measured = [values for values in self.seen().values() if not isinstance(values, str)]
        if len(measured) < SAME:
            return
        for name, *values in zip(self._objectives, *measured, strict=True):
            if len(set(values)) == 1:
                raise EvaluationError(
                    f"objective {name!r} is {values[0]:g} at all {len(values)} configurations "
                    "measured: it does not depend on what is decomposed; leave it out, or measure "
                    "it on data where models differ"
                )

    def front(self, maximize: Collection[str]) -> Front:
        """Return the front of all recorded trials."""
        points: dict[str, Point] = {}
        failed: dict[str, str] = {}
        for trial in self._recorded():
            made = _configuration(trial)
            if ERROR in trial.user_attrs:
                failed[str(made)] = trial.user_attrs[ERROR]
                continue
            values = dict(zip(self._objectives, trial.values, strict=True))
            points[made.key] = Point(made, self._space.percent(made), values)
        return Front.of(list(points.values()), points[DENSE.key], maximize, failed)


def _sampler(name: str, seed: int) -> optuna.samplers.BaseSampler:
    """Return a new sampler; with one seed per trial, an interruption changes nothing."""
    from optuna.samplers import NSGAIISampler, RandomSampler, TPESampler

    if name == RANDOM:
        return RandomSampler(seed=seed)
    if name == "nsga2":
        return NSGAIISampler(population_size=POPULATION, seed=seed)
    return TPESampler(seed=seed)


def _configuration(trial: optuna.trial.FrozenTrial) -> Configuration:
    return Configuration.from_dict(trial.user_attrs[CONFIGURATION])


def _draw(space: DesignSpace, trial: optuna.Trial) -> Configuration:
    """Draw a configuration, and drop layers that break a rule."""

    def yes(name: str) -> bool:
        return bool(trial.suggest_categorical(name, [False, True]))

    drawn = [layer for layer in space.sets.layers if yes(f"layer {layer}")]
    layers, tensors = space.sets.thin(drawn), tuple(space.tensors)
    if not space.whole:
        tensors = tuple([name for name in tensors if yes(f"tensor {name}")])
    rank = trial.suggest_categorical("rank", space.ranks)
    form = trial.suggest_categorical("format", space.formats)
    made = Configuration(layers, tensors, int(rank), str(form))
    return DENSE if made.is_dense else made


def _parameters(space: DesignSpace, configuration: Configuration) -> dict[str, Any]:
    """Return what a trial draws to reach a configuration; for the dense one, no layer at all."""
    dense = configuration.is_dense
    found: dict[str, Any] = {
        f"layer {layer}": layer in configuration.layers for layer in space.sets.layers
    }
    if not space.whole:
        found |= {
            f"tensor {name}": dense or name in configuration.tensors for name in space.tensors
        }
    found["rank"] = space.ranks[0] if dense else configuration.rank
    found["format"] = space.formats[0] if dense else configuration.format
    return found
