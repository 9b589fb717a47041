"""The command line of phase two: parse it into dataclasses and collect everything that is wrong with it."""

from __future__ import annotations

import json
import sys
from base64 import b64decode
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser

from llava_twophase.command_line import CommandParser, problems_error
from llava_twophase.errors import UserError
from llava_twophase.train.arguments import Arguments, ProjectorTrainingArguments
from llava_twophase.train.flag_checks import flag_problems
from llava_twophase.train.flags import DataArguments, ModelArguments

_GROUPS = (ModelArguments, DataArguments, ProjectorTrainingArguments)
# Names that other trainers use, which no measure of similarity finds.
_OTHER_NAMES = {
    "--lr": "--learning_rate",
    "--wd": "--weight_decay",
    "--epochs": "--num_train_epochs",
    "--batch_size": "--per_device_train_batch_size",
    "--bs": "--per_device_train_batch_size",
    "--model": "--model_name_or_path",
    "--images": "--image_folder",
    "--cache": "--feature_cache",
}
# Flags of HF Trainer that take a JSON object, and whether they also take a file of one.
_JSON_FLAGS = {
    "deepspeed": True,
    "accelerator_config": True,
    "fsdp_config": True,
    "lr_scheduler_kwargs": False,
    "activation_checkpointing_kwargs": False,
    "gradient_checkpointing_kwargs": False,
}


@dataclass(frozen=True)
class ParsedCommand:
    """A command line and what is wrong with it.

    Attributes:
        arguments: The arguments, with defaults in the place of values that could not be parsed.
        usage_problems: Unknown or missing flags and values of the wrong type.
        flag_problems: Values that stage 1 cannot honour.
        faulty: Names of the flags that have a problem; the values of those with a usage problem are defaults.
        usage: The command's usage line.
    """

    arguments: Arguments
    usage_problems: Sequence[str]
    flag_problems: Sequence[str]
    faulty: frozenset[str]
    usage: str

    def error(self, input_problems: Sequence[str] = ()) -> UserError | None:
        """Return one error for all problems, or None if there are none.

        Args:
            input_problems: Problems of the files that the flags name.
        """
        problems = [*self.usage_problems, *self.flag_problems, *input_problems]
        if not problems:
            return None
        return problems_error(problems, self.usage if self.usage_problems else None)


def build_parser() -> CommandParser:
    """Return the command's argument parser, with all flags of HF Trainer; ``help.py`` prints its help."""
    parser = _Parser(_GROUPS, prog="llava-train-projector", add_help=False)
    parser.require("--output_dir")
    return parser


def parse_arguments(argv: Sequence[str] | None = None) -> Arguments:
    """Parse and check a command line.

    Args:
        argv: Arguments without the program's name; ``sys.argv`` by default.

    Returns:
        The arguments. torch's process group and device are set up as TrainingArguments does.

    Raises:
        UserError: All problems that were found.
    """
    parsed = parse_command(argv)
    error = parsed.error()
    if error is not None:
        raise error
    return parsed.arguments


def parse_command(argv: Sequence[str] | None = None) -> ParsedCommand:
    """Parse a command line without stopping at the first problem.

    Args:
        argv: Arguments without the program's name; ``sys.argv`` by default.
    """
    parser = build_parser()
    tokens = sys.argv[1:] if argv is None else argv
    found = vars(parser.collect(tokens))
    json_problems = _json_problems(found)
    faulty = parser.faulty | json_problems.keys()
    values = {name: value for name, value in found.items() if name not in faulty}
    model = ModelArguments(**_values_of(ModelArguments, values))
    data = DataArguments(**_values_of(DataArguments, values))
    training_values = _values_of(ProjectorTrainingArguments, values)
    problems = list(json_problems.values())
    try:
        training = ProjectorTrainingArguments(**training_values)
    except (ValueError, TypeError, ImportError, AssertionError, RuntimeError, OSError) as error:
        problems.append(str(error))
        training = _default_training(training_values)
    arguments = Arguments(model, data, training, given=_typed(tokens))
    refused = flag_problems(arguments, faulty)
    return ParsedCommand(
        arguments=arguments,
        usage_problems=parser.problems,
        flag_problems=[*problems, *(message for _, message in refused)],
        faulty=frozenset(faulty | {flag for flag, _ in refused}),
        usage=parser.usage_line(),
    )


class _Parser(CommandParser, HfArgumentParser):
    """Collects problems; its flags are the fields of dataclasses."""

    other_names = _OTHER_NAMES

    def expected_of(self, convert: Any) -> str:
        """Return what the values of a ``type`` are."""
        return super().expected_of(convert) or "True or False"


def _json_problems(values: dict[str, Any]) -> dict[str, str]:
    """Return a message for each flag of HF Trainer whose value is not a JSON object, or a file of one, by its name."""
    problems = {}
    for name, is_file in _JSON_FLAGS.items():
        text = values.get(name)
        if text is None:
            continue
        try:
            content = _read_json(text) if is_file else json.loads(text)
            found = f"found a {type(content).__name__}"
        except (OSError, ValueError) as error:
            content, found = None, getattr(error, "strerror", None) or f"it is not valid JSON: {error}"
        if not isinstance(content, dict):
            expected = "a JSON object" + (", or a file of one such as pipelines/zero2.json" if is_file else "")
            problems[name] = f"--{name} {text}: {found}; expected {expected}"
    return problems


def _read_json(text: str) -> Any:
    if text.startswith("{"):
        return json.loads(text)
    if not Path(text).exists():
        try:
            return json.loads(b64decode(text, altchars=b"-_", validate=True))  # a form that transformers documents
        except ValueError:
            pass
    return json.loads(Path(text).read_bytes())


def _typed(tokens: Sequence[str]) -> dict[str, Any]:
    given: dict[str, Any] = {}
    name = None
    for token in tokens:
        if token.startswith("--"):
            flag, separator, value = token.partition("=")
            name = flag.removeprefix("--").replace("-", "_")
            given[name] = [value] if separator else []
        elif name is not None:
            given[name].append(token)
    return {name: " ".join(parts) for name, parts in given.items()}


def _values_of(group: Any, values: dict[str, Any]) -> dict[str, Any]:
    names = {field.name: field.default is MISSING and field.default_factory is MISSING for field in fields(group)}
    chosen = {name: value for name, value in values.items() if name in names}
    # A required flag that is missing has been reported; the empty value lets the other flags be checked.
    return {**{name: "" for name, required in names.items() if required}, **chosen}


def _default_training(values: dict[str, Any]) -> ProjectorTrainingArguments:
    return ProjectorTrainingArguments(output_dir=values.get("output_dir"), report_to="none", use_cpu=True)
