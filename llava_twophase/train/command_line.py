"""The command line of phase two: parse it into dataclasses and collect everything that is wrong with it."""

from __future__ import annotations

import argparse
import difflib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any

from transformers import HfArgumentParser

from llava_twophase.errors import UserError
from llava_twophase.train.arguments import Arguments, DataArguments, ModelArguments, ProjectorTrainingArguments
from llava_twophase.train.flag_checks import flag_problems

EXAMPLE = """\
example, LLaVA's recipe from a feature cache:
  deepspeed pipelines/train_projector.py --deepspeed pipelines/zero2.json \\
      --model_name_or_path lmsys/vicuna-13b-v1.5 --version plain \\
      --data_path blip_laion_cc_sbu_558k.json --feature_cache caches/clip-l-336 \\
      --vision_tower openai/clip-vit-large-patch14-336 --mm_projector_type mlp2x_gelu \\
      --tune_mm_mlp_adapter True --bf16 True --output_dir checkpoints/llava-v1.5-13b-pretrain \\
      --num_train_epochs 1 --per_device_train_batch_size 32 --learning_rate 1e-3 --weight_decay 0. \\
      --warmup_ratio 0.03 --lr_scheduler_type cosine --model_max_length 2048
"""
_GROUPS = (ModelArguments, DataArguments, ProjectorTrainingArguments)
_REQUIRED = ("--model_name_or_path", "--data_path", "--vision_tower", "--output_dir")
_USAGE = (
    "usage: llava-train-projector --model_name_or_path LLM --data_path RECORDS --vision_tower TOWER "
    "--output_dir FOLDER ... (--help lists all flags)"
)
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
_EXPECTED: dict[Any, str] = {int: "a whole number", float: "a number"}


class UsageError(UserError):
    """A command line that cannot be parsed; the command prints a usage line and exits with 2."""

    def __str__(self) -> str:
        """Return the usage line and the problems."""
        return f"{self.args[0]}\n{_USAGE}"


@dataclass(frozen=True)
class ParsedCommand:
    """A command line and what is wrong with it.

    Attributes:
        arguments: The arguments, with defaults in the place of values that could not be parsed.
        usage_problems: Unknown or missing flags and values of the wrong type.
        flag_problems: Values that stage 1 cannot honour.
        faulty: Names of the flags that have a problem; the values of those with a usage problem are defaults.
    """

    arguments: Arguments
    usage_problems: Sequence[str]
    flag_problems: Sequence[str]
    faulty: frozenset[str]

    def error(self, input_problems: Sequence[str] = ()) -> UserError | None:
        """Return one error for all problems, or None if there are none.

        Args:
            input_problems: Problems of the files that the flags name.
        """
        problems = [*self.usage_problems, *self.flag_problems, *input_problems]
        if not problems:
            return None
        kind = UsageError if self.usage_problems else UserError
        if len(problems) == 1:
            return kind(problems[0])
        return kind("\n  ".join([f"{len(problems)} problems were found; nothing was started:", *problems]))


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
    parser = _CollectingParser(
        _GROUPS,
        prog="llava-train-projector",
        description="Phase two: train mm_projector against a frozen LLM, from a feature cache or on the fly.",
        epilog=EXAMPLE,
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
        exit_on_error=False,
    )
    values, given = parser.collect(argv)
    model = ModelArguments(**_values_of(ModelArguments, values))
    data = DataArguments(**_values_of(DataArguments, values))
    training_values = _values_of(ProjectorTrainingArguments, values)
    problems: list[str] = []
    try:
        training = ProjectorTrainingArguments(**training_values)
    except json.JSONDecodeError as error:
        problems.append(f"--deepspeed, or another flag that takes JSON, is not valid JSON: {error}")
        training = _default_training(training_values)
    except (ValueError, TypeError, ImportError, AssertionError, RuntimeError, OSError) as error:
        problems.append(str(error))
        training = _default_training(training_values)
    arguments = Arguments(model, data, training, given)
    refused = flag_problems(arguments, parser.faulty)
    return ParsedCommand(
        arguments=arguments,
        usage_problems=parser.problems,
        flag_problems=[*problems, *(message for _, message in refused)],
        faulty=frozenset(parser.faulty | {flag for flag, _ in refused}),
    )


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults and keeps the line breaks of the example."""


class _CollectingParser(HfArgumentParser):
    """Collects problems in place of exiting at the first one.

    Attributes:
        problems: One line for each problem.
        faulty: Names of the flags that have one.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.problems: list[str] = []
        self.faulty: set[str] = set()
        self._flags: list[str] = []
        super().__init__(*args, **kwargs)

    def add_argument(self, *names: Any, **options: Any) -> argparse.Action:
        """Add a flag whose conversion and choices are checked by this class."""
        if "type" in options:
            choices = options.pop("choices", None)
            if choices is not None:
                options["metavar"] = "{" + ",".join(map(str, choices)) + "}"
            options["type"] = self._collecting(names[0], options["type"], choices)
        options.pop("required", None)
        self._flags += [name for name in names if name.startswith("--") and "-" not in name[2:]]
        return super().add_argument(*names, **options)

    def collect(self, argv: Sequence[str] | None) -> tuple[dict[str, Any], dict[str, Any]]:
        """Parse a command line; return the values of valid flags, and what was typed."""
        tokens = sys.argv[1:] if argv is None else list(argv)
        while True:
            try:
                found, unknown = self.parse_known_args(tokens)
                break
            except argparse.ArgumentError as error:
                flag = str(error.argument_name).split("/")[0]
                self._note(flag, f"{flag}: {error.message}")
                tokens = [token for token in tokens if token.split("=")[0].replace("-", "_") != flag.replace("-", "_")]
        self._note_unknown(unknown)
        values = vars(found)
        for flag in _REQUIRED:
            if not values.get(_name(flag)) and _name(flag) not in self.faulty:
                self._note(flag, f"{flag} is required")
        return {name: value for name, value in values.items() if name not in self.faulty}, _typed(tokens)

    def _collecting(self, flag: str, convert: Callable[[str], Any], choices: Sequence[Any] | None) -> Any:
        def checked(text: str) -> Any:
            try:
                value = convert(text)
                valid = choices is None or value in choices
            except (ValueError, TypeError, argparse.ArgumentTypeError):
                value, valid = None, False
            if not valid:
                expected = (
                    f"one of {', '.join(map(str, choices))}" if choices else _EXPECTED.get(convert, "True or False")
                )
                self._note(flag, f"{flag} {text}: expected {expected}")
            return value

        return checked

    def _note(self, flag: str, problem: str) -> None:
        self.faulty.add(_name(flag))
        self.problems.append(problem)

    def _note_unknown(self, tokens: Sequence[str]) -> None:
        after_flag = False
        for token in tokens:
            if token.startswith("--"):
                flag = token.split("=")[0]
                closest = _closest(flag, self._flags)
                self.problems.append(f"{flag} is not a flag" + (f"; did you mean {closest}?" if closest else ""))
            elif not after_flag:
                self.problems.append(f"{token!r} does not belong to a flag")
            after_flag = token.startswith("--")


def _expected(convert: Callable[[str], Any], choices: Sequence[Any] | None) -> str:
    if choices:
        return f"one of {', '.join(map(str, choices))}"
    return _EXPECTED.get(convert, "True or False")


def _closest(flag: str, known: Sequence[str]) -> str | None:
    spelled = f"--{_name(flag).lower()}"
    if spelled in _OTHER_NAMES:
        return _OTHER_NAMES[spelled]
    return next(iter(difflib.get_close_matches(spelled, known, n=1)), None)


def _name(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")


def _typed(tokens: Sequence[str]) -> dict[str, Any]:
    given: dict[str, Any] = {}
    name = None
    for token in tokens:
        if token.startswith("--"):
            flag, separator, value = token.partition("=")
            name = _name(flag)
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
