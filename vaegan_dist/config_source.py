"""Where a configuration comes from: a preset, then YAML files, then dotted overrides, each on top of the last.

Every mistake becomes one line that names the key, the value and the remedy (`ConfigError`, exit code 2).
"""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from vaegan_dist.config import Config, ConvModel, KlModel, MlpModel, PhaseSettingsError, merge_tree
from vaegan_dist.errors import ConfigError

UNION_TAGS = {model.model_fields["network"].default for model in (MlpModel, ConvModel, KlModel)} | {"number", "range"}
PRESETS = resources.files("vaegan_dist") / "presets"


class _Loader(yaml.SafeLoader):
    """Reads `1e-3` as a number, as people write it; plain YAML 1.1 takes it for a string."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)$"),
    list("-+0123456789."),
)


def preset_names() -> list[str]:
    """Names of the presets that come with the package."""
    return sorted(entry.name.removesuffix(".yaml") for entry in PRESETS.iterdir() if entry.name.endswith(".yaml"))


def preset_tree(name: str) -> dict[str, Any]:
    """The keys that a preset sets."""
    if name not in preset_names():
        raise ConfigError(
            f"preset '{name}' is unknown{_suggest(name, preset_names())}; presets: {_list(preset_names())}"
        )
    return parse_yaml((PRESETS / f"{name}.yaml").read_text(), f"preset {name}")


def load_config(preset: str | None = None, files: Sequence[str | Path] = (), overrides: Iterable[str] = ()) -> Config:
    """Resolve a configuration.

    Args:
        preset: name of a preset; without one a file's `preset:` key, else the defaults.
        files: YAML files, each laid over the last.
        overrides: `key.path=value` items; values are YAML. Phases go by name or number (`phases.joint.images=1000`).
    """
    trees = [_read(Path(file)) for file in files]
    named = preset or next((tree["preset"] for tree in reversed(trees) if tree.get("preset")), None)
    tree = preset_tree(named) if named else {}
    tree.setdefault("phases", Config().model_dump(mode="json")["phases"])
    for layer in trees:
        tree = _lay(tree, layer)
    for item in overrides:
        _override(tree, item)
    if isinstance(tree.get("model"), dict):
        tree["model"].setdefault("network", MlpModel.model_fields["network"].default)
    if named:
        tree["preset"] = named
        tree.setdefault("run", {})
        if isinstance(tree["run"], dict):
            tree["run"].setdefault("name", named)
    return validate(tree)


def _lay(tree: dict[str, Any], layer: dict[str, Any]) -> dict[str, Any]:
    """A file over the tree so far; a `model` of another network replaces the whole section, whose keys it lacks."""
    below, above = tree.get("model"), layer.get("model")
    if (
        isinstance(below, dict)
        and isinstance(above, dict)
        and above.get("network", below.get("network")) != below.get("network")
    ):
        tree = {**tree, "model": above}
    return merge_tree(tree, layer)


def validate(tree: dict[str, Any]) -> Config:
    """A checked configuration from plain data, or a `ConfigError` of one line."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        lines = [line for item in error.errors() if item["type"] != "too_short" for line in _explain(item)]
        raise ConfigError(
            "; ".join(lines[:3] or [line for item in error.errors() for line in _explain(item)])
        ) from None


def dump_yaml(config: Config) -> str:
    """The resolved configuration as YAML that `load_config` reads back to the same tree."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=100)


def reference(default: Config) -> list[tuple[str, str, str, str]]:
    """Every key with its type, its value in `default` and its description, in the order of the tree."""
    rows: list[tuple[str, str, str, str]] = []
    _walk(default, "", rows)
    return rows


def _walk(section: BaseModel, prefix: str, rows: list[tuple[str, str, str, str]]) -> None:
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            _walk(value, f"{prefix}{name}.", rows)
        elif isinstance(value, tuple) and value and isinstance(value[0], BaseModel):
            for item in value:
                _walk(item, f"{prefix}{name}.{getattr(item, 'name', '?')}.", rows)
        else:
            text = "null" if value is None else yaml.safe_dump(_plain(value), default_flow_style=True).split("\n")[0]
            rows.append((prefix + name, type_name(field), text, " ".join((field.description or "").split())))


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def type_name(field: FieldInfo) -> str:
    """Readable type of a field: `int`, `float`, `hinge|minimax`, `list`."""
    return _type_name(field.annotation)


def _type_name(annotation: Any) -> str:
    arguments = get_args(annotation)
    if annotation is type(None):
        return "null"
    origin = getattr(annotation, "__origin__", None)
    if origin is tuple or annotation is tuple:
        return "list of " + _type_name(arguments[0])
    if origin is dict:
        return "mapping"
    if hasattr(annotation, "__metadata__"):
        return _type_name(annotation.__origin__)
    if arguments and all(not isinstance(a, type) and isinstance(a, str | int) for a in arguments):
        return "|".join(str(a) for a in arguments)
    if arguments:
        return "|".join(dict.fromkeys(_type_name(a) for a in arguments))
    return getattr(annotation, "__name__", str(annotation))


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text()
    except OSError as error:
        raise ConfigError(f"configuration file '{path}' cannot be read: {error.strerror}") from None
    return parse_yaml(text, str(path))


def parse_yaml(text: str, source: str) -> dict[str, Any]:
    """Keys and values of a YAML text; `source` names it in the error."""
    try:
        tree = yaml.load(text, _Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{source}{where}: not valid YAML: {getattr(error, 'problem', error)}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{source}: expected keys and values, found {type(tree).__name__}")
    return tree


def _override(tree: dict[str, Any], item: str) -> None:
    """Lay one `key.path=value` over the tree, in place."""
    path, value = parse_override(item)
    _set(tree, path, value)


def parse_override(item: str) -> tuple[str, Any]:
    """Key and value of a `key.path=value`; the value is YAML."""
    path, separator, text = item.removeprefix("--").partition("=")
    if not separator:
        raise ConfigError(f"'{item}' is not an override; write key=value, for example training.batch_size=256")
    try:
        return path, yaml.load(text, _Loader)  # a SafeLoader
    except yaml.YAMLError:
        return path, text


def with_changes(config: Config, changes: Mapping[str, Any]) -> Config:
    """A configuration with some keys changed, by dotted path as on the command line, and checked anew.

    Another `model.network` starts from that network's defaults. Raises ConfigError as `load_config` does.
    """
    tree = config.model_dump(mode="json")
    for path, value in sorted(changes.items(), key=lambda item: item[0] not in ("model", "model.network")):
        network = value.get("network") if path == "model" and isinstance(value, dict) else value
        if path in ("model", "model.network") and network not in (None, tree["model"]["network"]):
            tree["model"] = {"network": network}
        if path != "model.network":
            _set(tree, path, value, merge=True)
    return validate(tree)


def _set(tree: dict[str, Any], path: str, value: Any, merge: bool = False) -> None:
    """Put a value at a dotted path, in place; `merge` lays a mapping over the one that is there."""
    keys = path.replace("-", "_").split(".")
    node: Any = tree
    for depth, key in enumerate(keys[:-1]):
        if isinstance(node, list):
            node = node[_list_index(node, keys, depth)]
        else:
            child = node.get(key)
            node[key] = child = dict(child) if isinstance(child, dict) else list(child) if child else {}
            node = child
    if isinstance(node, list):
        node[_list_index(node, keys, len(keys) - 1)] = value
    elif merge and isinstance(value, dict) and isinstance(node.get(keys[-1]), dict):
        node[keys[-1]] = merge_tree(node[keys[-1]], value)
    else:
        node[keys[-1]] = value


def _list_index(items: list[Any], keys: list[str], depth: int) -> int:
    """Position of the item that a key names, by its number or its `name` (either way it is copied first)."""
    names = [str(item.get("name", "")) if isinstance(item, dict) else "" for item in items]
    key, path = keys[depth], ".".join(keys[: depth + 1])
    wanted = [n.replace("-", "_") for n in names]
    index = wanted.index(key) if key in wanted else int(key) if key.isdecimal() else -1
    if not 0 <= index < len(items):
        raise ConfigError(f"{path}: no such item; there are {_list(names)}")
    items[index] = dict(items[index]) if isinstance(items[index], dict) else items[index]
    return index


def _explain(error: Any, prefix: tuple[Any, ...] = ()) -> list[str]:
    """Lines for one validation error; `prefix` is where the section that failed stands in the tree."""
    location = [*prefix, *(part for part in error["loc"] if part not in UNION_TAGS)]
    key, value, kind = ".".join(map(str, location)), _short(error.get("input")), error["type"]
    context = error.get("ctx", {})
    cause = context.get("error")
    if isinstance(cause, PhaseSettingsError):
        within = ("phases", cause.phase, "settings")
        return [line for item in cause.error.errors() for line in _explain(item, within)]
    if kind == "extra_forbidden":
        known = _known_keys(location[:-1])
        return [f"{key}={value}: unknown key{_suggest(str(location[-1]), known)}; keys here: {_list(known)}"]
    if kind == "value_error":
        return [f"{key}: {cause}" if key else str(cause)]
    if kind == "union_tag_invalid":
        return [f"{key}.network={context['tag']}: choose one of {context['expected_tags']}"]
    if kind == "missing":
        return [f"{key}: is required; add it"]
    return [f"{key}={value}: {error['msg'][0].lower()}{error['msg'][1:]}"]


def _known_keys(location: list[Any]) -> list[str]:
    """Keys of the section at a location of the tree (all of a union's members where it is one)."""
    if location[:1] == ["phases"] and "settings" in location:
        location = ["objective", *location[location.index("settings") + 1 :]]
    models: list[type[BaseModel]] = [Config]
    for part in location:
        fields = [model.model_fields[part] for model in models if part in model.model_fields]
        models = [model for field in fields for model in _models_in(field.annotation)] or models
    return list(dict.fromkeys(name for model in models for name in model.model_fields))


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models_in(argument)]


def _suggest(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, 1, 0.5)
    return f" (did you mean '{close[0]}'?)" if close else ""


def _list(names: Sequence[str]) -> str:
    return ", ".join(names)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
