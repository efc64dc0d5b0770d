"""YAML recipes and command line to dataclasses and back, with jsonargparse (only used here)."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml

from dino_simpool.config.words import TOLD, explain_unknown

Config = TypeVar("Config")


class ConfigError(ValueError):
    """A mistake in a recipe or on the command line, explained in one line."""


def _options(config: type, prefix: str = "") -> dict[str, dataclasses.Field[Any]]:
    """Dotted name -> field of all options of a configuration class, groups included."""
    found = {}
    for f in dataclasses.fields(config):
        found[prefix + f.name] = f
        if dataclasses.is_dataclass(f.default_factory):
            found |= _options(f.default_factory, f"{prefix}{f.name}.")
    return found


def option_names(config: type) -> dict[str, str]:
    """Dotted name -> annotation of all options of a configuration class, groups included."""
    return {name: str(f.type) for name, f in _options(config).items()}


def _allowed(annotation: str) -> str:
    """The values that an option accepts, in words."""
    if annotation.startswith("dict"):
        return "options of the encoder by name, as in --model.heads 6; a file of weights is a --checkpoint"
    if choices := re.search(r"Literal\[(.*)\]", annotation):
        return "one of " + re.sub("['\"]", "", choices[1])
    for kind, word in (("int", "whole number"), ("float", "number"), ("str", "text")):
        # A tuple is written [number, number].
        annotation = re.sub(rf"(?<=[\[ ]){kind}(?=[,\]])", word, annotation).replace("tuple[", "[")
    words = {"None": "null", "int": "a whole number", "float": "a number", "str": "text", "bool": "true or false"}
    words["Duration"] = "a duration"
    words["ValueRange"] = "full, data, percentiles or [LOW, HIGH]"
    words["ExtraBand"], words["Transparency"] = "refuse, ignore or alpha", "white, black, gray or ignore"
    return " or ".join(words.get(part, part) for part in annotation.split(" | "))


def _explain(message: str, config: type) -> str:
    """The library's message in one line, with the nearest option or the allowed values."""
    message = " ".join(message.split())
    names = option_names(config)
    unknown = re.search(r"Group '([\w.]+)' does not accept option '([\w.-]+)'", message)
    unknown = unknown or re.search(r"(?:Option '|unrecognized arguments: (?:--)?)()([\w.-]+)", message)
    if unknown:
        given = f"{unknown[1]}.{unknown[2]}" if unknown[1] else unknown[2]
        told = [f"model.{name}" for name in TOLD if names.get("model", "").startswith("dict")]
        return f"unknown option {given}: {explain_unknown(given, [*names, *told])}"
    if group := re.search(r'Parser key "(\w+)": Unable to load config', message):
        first = next(name for name in names if name.startswith(f"{group[1]}."))
        return f"{group[1]} is a group of options: give each by its own name, as in --{first} VALUE"
    wrong = re.search(r'Parser key "([\w.]+)".*(?:Given|Got) value: (.*)', message)
    if wrong and wrong[1] in names:
        hint = " (write null, not None)" if wrong[2] == "None" else ""
        return f"{wrong[1]} is {wrong[2]}: allowed is {_allowed(names[wrong[1]])}{hint}"
    return message


@functools.cache  # made in 0.1 s, used in 0.01 s
def _parser(config: type, program: str) -> Any:
    from jsonargparse import ArgumentParser, set_parsing_settings  # 0.1 s: only where options are read

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(prog=program, description=config.__doc__, exit_on_error=False, allow_abbrev=False)
    parser.add_argument(
        "--config",
        action="config",
        help="A recipe: a file, or a name such as vit_small_simpool. Give it first. Several recipes are merged.",
    )
    parser.add_class_arguments(config)
    options = _options(config)
    for action in parser._actions:
        if action.dest in options and (limits := options[action.dest].metadata.get("limits")):
            action.help = f"{action.help} Allowed: {limits}."
        if getattr(action, "_typehint", None) in (bool, bool | None):  # `--index` alone says `--index true`
            action.nargs, action.const = "?", True
    return parser


def _read(config: type[Config], program: str, read: Callable[[Any], Any]) -> Config:
    parser = _parser(cast(Any, config), program)
    try:
        values = parser.instantiate(read(parser))
        return config(**{f.name: values[f.name] for f in dataclasses.fields(config)})  # type: ignore[arg-type]
    except (argparse.ArgumentError, ValueError, TypeError, AttributeError, RecursionError, yaml.YAMLError, OSError) as error:
        raise ConfigError(_explain(str(error), config)) from None


def _recipe(name: str) -> str:
    """Path of a recipe that is given by path, or by name if it comes with the package."""
    here = Path(__file__).resolve().parents[1]
    folders = [here / "configs", here.parent / "configs"]
    candidates = [Path(name), *(folder / f"{name}.yaml" for folder in folders)]
    for path in candidates:
        if path.is_file():
            return str(path)
    known = sorted(path.stem for folder in folders for path in folder.glob("*.yaml"))
    near = difflib.get_close_matches(Path(name).stem, known, 1)
    raise ConfigError(f"no recipe {name}" + (f": did you mean {near[0]}?" if near else f"; recipes: {', '.join(known)}"))


def _check_groups(config: type, values: dict[str, Any]) -> None:
    """ConfigError where the library would read another file: a group that is text, and `config`."""
    if "config" in values:
        raise ConfigError("config is no option of a recipe: to merge recipes, write --config FIRST --config SECOND")
    for f in dataclasses.fields(config):
        if dataclasses.is_dataclass(f.default_factory) and not isinstance(values.get(f.name, {}), dict):
            raise ConfigError(f"{f.name} is a group of options: write {f.name}: {{NAME: VALUE}}")


def _check_recipe(path: str, config: type) -> str:
    """The path, after checks that the library lacks: groups are groups, no option comes twice."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        node, values = yaml.compose(text, yaml.SafeLoader), yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}: {error.problem}" if isinstance(error, yaml.MarkedYAMLError) and mark else str(error)
        raise ConfigError(f"{path} is not YAML, {line}") from None
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{path} is not a recipe: it has no options, such as `run: {{seed: 1}}`")
    _check_groups(config, values)  # as loaded: aliases and merged mappings are resolved
    groups = {key.value: value for key, value in node.value if isinstance(value, yaml.MappingNode)}
    for prefix, mapping in [("", node), *((f"{name}.", group) for name, group in groups.items())]:
        keys = [key.value for key, _ in mapping.value]
        if twice := [key for key in keys if keys.count(key) > 1]:  # YAML would drop the first
            raise ConfigError(f"{path} gives {prefix}{twice[0]} twice: write it once")
    return path


def _find_recipes(arguments: list[str], config: type) -> list[str]:
    """The arguments with paths in place of recipe names."""
    found: list[str] = []
    first, remaining = "", iter(arguments)  # first: the first option
    for argument in remaining:
        name, equals, value = argument.partition("=")
        if name != "--config":
            if name.startswith("--") and not name.startswith("--print_config"):
                first = first or name
            found.append(argument)
            continue
        if first:
            raise ConfigError(f"--config comes before the options that change it: here {first} comes first")
        recipe = value if equals else next(remaining, "")
        if not recipe:
            raise ConfigError("--config needs a recipe: a file or a name")
        found += ["--config", _check_recipe(_recipe(recipe), config)]
    return found


def parse(config: type[Config], arguments: list[str], *, program: str = "dino-simpool") -> Config:
    """Command-line arguments, and the YAML recipes that they name, to a configuration.

    `--help` and `--print_config` print and raise SystemExit(0). ConfigError says in one line what
    is wrong.
    """
    found = _find_recipes(arguments, config)
    if (others := [word for word in found if word.partition("=")[0] != "--print_config"]) != found:
        parse(config, others, program=program)  # only options that a run would take are printed
    return _read(config, program, lambda parser: parser.parse_args(found))


def from_dict(config: type[Config], values: dict[str, Any]) -> Config:
    """A plain dict to a configuration. ConfigError for unknown keys and wrong types."""
    _check_groups(config, values)
    return _read(config, "dino-simpool", lambda parser: parser.parse_object(values))


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration to a nested dict of plain values (tuples become lists), for YAML and JSON."""
    return dict(json.loads(json.dumps(dataclasses.asdict(config))))


def dump(config: Any) -> str:
    """A configuration as YAML that `parse` reads back to the same configuration."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)
