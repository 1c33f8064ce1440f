"""The search space: configuration keys, what each may be, and under which condition."""

import itertools
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from vaegan_dist.config import Config
from vaegan_dist.config_source import with_changes
from vaegan_dist.errors import ConfigError

Kind = Literal["uniform", "loguniform", "randint", "choice", "grid"]
KINDS: tuple[Kind, ...] = get_args(Kind)
# What the sweep decides for its trials.
OWNED = ("run.name", "run.storage", "cluster.workers", "checkpoint.images", "preset")
DIGITS = 6  # of a drawn number: what a person can read and type again
FACTORS = (0.8, 1.25)

Params = dict[str, Any]


@dataclass(frozen=True)
class Domain:
    """What one key may be, where `when` holds."""

    kind: Kind
    values: tuple[Any, ...]
    """the two bounds, both included, or the choices"""
    when: dict[str, Any] = field(default_factory=dict)

    @property
    def finite(self) -> bool:
        """Whether it is a list of choices."""
        return self.kind in ("choice", "grid")

    def ends(self) -> tuple[Any, ...]:
        """Values that stand for all when the domain is checked."""
        return self.values

    def holds(self, params: Mapping[str, Any]) -> bool:
        """Whether the condition is met by what is chosen already."""
        return all(params.get(key) in _listed(value) for key, value in self.when.items())

    def contains(self, value: Any) -> bool:
        """Whether a value is one of the domain's."""
        if self.finite:
            return value in self.values
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and self.values[0] <= value <= self.values[1] and (self.kind != "randint" or value == int(value))

    def tidy(self, value: Any) -> Any:
        """A drawn value in a few digits, inside of the bounds."""
        if self.finite:
            return value
        low, high = self.values
        if self.kind == "randint":
            return min(max(round(value), low), high)
        return min(max(float(f"{value:.{DIGITS}g}"), low), high)

    def draw(self, rng: random.Random) -> Any:
        """A value at random."""
        if self.finite:
            return rng.choice(self.values)
        low, high = self.values
        if self.kind == "loguniform":
            return self.tidy(math.exp(rng.uniform(math.log(low), math.log(high))))
        return rng.randint(low, high) if self.kind == "randint" else self.tidy(rng.uniform(low, high))

    def perturb(self, value: Any, rng: random.Random, resample: float) -> Any:
        """A neighbour of a value: times 0.8 or 1.25, or the choice beside it; with probability `resample` any."""
        if rng.random() < resample or value is None or not self.contains(value):
            return self.draw(rng)
        if self.finite:
            place = self.values.index(value) + rng.choice((-1, 1))
            return self.values[min(max(place, 0), len(self.values) - 1)]
        moved = value * rng.choice(FACTORS)
        if self.kind == "randint" and round(moved) == value:
            moved = value + rng.choice((-1, 1))
        return self.tidy(moved)


def _listed(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else (value,)


@dataclass(frozen=True)
class Space:
    """Domains by key, ordered so that a condition's key comes before the key that depends on it."""

    domains: dict[str, tuple[Domain, ...]]
    fixed: Params
    """keys with one value, the same for every trial"""

    def walk(self, choose: Callable[[str, int, Domain], Any]) -> Params:
        """A point: `choose` names the value of each key that its condition admits."""
        params: Params = {}
        for key, branches in self.domains.items():
            for number, domain in enumerate(branches):
                if domain.holds({**self.fixed, **params}):
                    params[key] = choose(key, number, domain)
                    break
        return params

    def grid(self, only: Sequence[Kind] = ("grid",)) -> list[Params]:
        """Every combination of the finite domains of these kinds; `[{}]` where there is none."""
        points: list[Params] = [{}]
        for key, branches in self.domains.items():
            points = [{**point, **chosen} for point in points for chosen in self._choices(key, branches, point, only)]
        return points

    def _choices(self, key: str, branches: Sequence[Domain], point: Params, only: Sequence[Kind]) -> Iterator[Params]:
        domain = next((domain for domain in branches if domain.holds({**self.fixed, **point})), None)
        if domain is None or domain.kind not in only:
            yield {}
        else:
            yield from ({key: value} for value in domain.values)

    @property
    def only_grid(self) -> bool:
        """Whether the grid is the whole space."""
        return all(domain.kind == "grid" for branches in self.domains.values() for domain in branches)

    def domain_of(self, key: str, params: Params) -> Domain | None:
        """The domain that a key has at a point."""
        known = {**self.fixed, **params}
        return next((domain for domain in self.domains.get(key, ()) if domain.holds(known)), None)

    def perturb(self, params: Params, rng: random.Random, resample: float) -> Params:
        """A point beside another one; what `grid` lists stays as it is."""

        def choose(key: str, number: int, domain: Domain) -> Any:
            if domain.kind == "grid":
                return params.get(key, domain.values[0])
            return domain.perturb(params.get(key), rng, resample)

        return self.walk(choose)


def read_space(tree: Mapping[str, Any]) -> Space:
    """The space that a file describes.

    Raises:
        ConfigError: names the key, what is wrong, and what to write.
    """
    domains, fixed = dict[str, tuple[Domain, ...]](), Params()
    for key, text in tree.items():
        if _is_branch(text):
            domains[key] = (_domain(key, text),)
        elif isinstance(text, list) and text and all(_is_branch(item) for item in text):
            domains[key] = tuple(_domain(key, item) for item in text)
        elif isinstance(text, dict) and not key.endswith(("settings", "model")):
            raise ConfigError(
                f"space.{key}: {text} is none of {', '.join(KINDS)}; write {key}: {{loguniform: [0.01, 10]}}"
            )
        else:
            fixed[key] = text
    return Space(_ordered(domains, fixed), fixed)


def _is_branch(text: Any) -> bool:
    return isinstance(text, dict) and any(kind in text for kind in KINDS)


def _domain(key: str, text: Mapping[str, Any]) -> Domain:
    kinds = [kind for kind in KINDS if kind in text]
    others = [str(word) for word in text if word not in (*KINDS, "when")]
    if len(kinds) != 1 or others:
        raise ConfigError(
            f"space.{key}: write one of {', '.join(KINDS)}, and `when` beside it if it has a condition, "
            f"not {', '.join(map(str, text))}"
        )
    kind, when = kinds[0], text.get("when", {})
    if not isinstance(when, dict):
        raise ConfigError(f"space.{key}.when={when}: write the keys it depends on and their values, {{key: value}}")
    values = text[kind]
    if not isinstance(values, list) or not values:
        raise ConfigError(f"space.{key}.{kind}={values}: give a list")
    if kind not in ("choice", "grid"):
        _check_bounds(key, kind, values)
    elif any(values.count(value) > 1 for value in values):
        raise ConfigError(f"space.{key}.{kind}={values}: a value stands there twice; leave one")
    return Domain(kind, tuple(values), when)


def _check_bounds(key: str, kind: Kind, bounds: list[Any]) -> None:
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) for v in bounds)
    if len(bounds) != 2 or not numbers:
        raise ConfigError(f"space.{key}.{kind}={bounds}: give two numbers, [low, high]")
    if bounds[0] >= bounds[1]:
        raise ConfigError(f"space.{key}.{kind}={bounds}: the first must be below the second")
    if kind == "loguniform" and bounds[0] <= 0:
        raise ConfigError(f"space.{key}.loguniform={bounds}: the lower bound must be above 0; or use uniform")
    if kind == "randint" and not all(isinstance(v, int) for v in bounds):
        raise ConfigError(f"space.{key}.randint={bounds}: give whole numbers; or use uniform")


def _ordered(domains: dict[str, tuple[Domain, ...]], fixed: Params) -> dict[str, tuple[Domain, ...]]:
    """Keys after those that their conditions name."""
    ordered: dict[str, tuple[Domain, ...]] = {}
    waiting = dict(domains)
    while waiting:
        ready = [
            k for k, branches in waiting.items() if all(w in ordered or w in fixed for d in branches for w in d.when)
        ]
        if not ready:
            key, branches = next(iter(waiting.items()))
            named = next(w for d in branches for w in d.when if w not in ordered and w not in fixed)
            raise ConfigError(
                f"space.{key}.when: '{named}' is not in the space, or depends on '{key}' itself; list it below `space`"
            )
        for key in ready:
            ordered[key] = waiting.pop(key)
    return ordered


def check_space(space: Space, config: Config, initial: Sequence[Params] = ()) -> None:
    """Try the ends and choices of every key on the configuration, so that no trial fails for its schema.

    Raises:
        ConfigError: names key, value and remedy.
    """
    for key in (*space.domains, *space.fixed):
        if any(key == owned or key.startswith(owned + ".") for owned in OWNED):
            raise ConfigError(f"space.{key}: the sweep decides it for each trial; leave it out")
    for point in _corners(space):
        _try(config, {**space.fixed, **point}, "space")
    for number, point in enumerate(initial):
        for key, value in point.items():
            branches = space.domains.get(key)
            if branches is None:
                raise ConfigError(f"initial.{number}.{key}: not in the space; keys there: {', '.join(space.domains)}")
            if not any(domain.contains(value) for domain in branches):
                raise ConfigError(f"initial.{number}.{key}={value}: outside of the space; choose a value inside")
        _try(config, {**space.fixed, **point}, f"initial.{number}")


def _corners(space: Space) -> Iterator[Params]:
    """Points in which every end and choice of every key occurs, under its condition."""
    for key, branches in space.domains.items():
        for domain in branches:
            for value, conditions in itertools.product(domain.ends(), _conditions(domain)):
                yield {**conditions, key: value}


def _conditions(domain: Domain) -> list[Params]:
    return [{key: _listed(value)[0] for key, value in domain.when.items()}]


def _try(config: Config, params: Params, where: str) -> None:
    try:
        with_changes(config, params)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
