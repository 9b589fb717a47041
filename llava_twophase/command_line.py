"""The argument parser of all commands: it collects every problem of a command line and prints a usage of one line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn

from llava_twophase.errors import UserError
from llava_twophase.text import did_you_mean


class UsageError(UserError):
    """A command line that cannot be parsed.

    Args:
        message: The problems.
        usage: One line that shows how the command is used.
    """

    exit_code = 2

    def __init__(self, message: str, usage: str) -> None:
        super().__init__(f"{message}\n{usage}")


@dataclass(frozen=True)
class Integer:
    """Converts a flag's value to an integer within limits.

    Attributes:
        least: The smallest valid value.
        most: The largest valid value, if there is one.
    """

    least: int
    most: int | None = None

    def __call__(self, text: str) -> int:
        """Convert a value.

        Raises:
            argparse.ArgumentTypeError: It is not an integer, or outside the limits.
        """
        try:
            value = int(text)
        except ValueError:
            value = self.least - 1
        if value < self.least or (self.most is not None and value > self.most):
            limit = f"of at least {self.least}" if self.most is None else f"from {self.least} to {self.most}"
            raise argparse.ArgumentTypeError(f"expected a whole number {limit}")
        return value


def boolean(text: str) -> bool:
    """Convert a flag's value, spelled as HF Trainer's flags accept it, to a truth value.

    Raises:
        argparse.ArgumentTypeError: It is not one.
    """
    if text.lower() in ("true", "yes", "y", "t", "1"):
        return True
    if text.lower() in ("false", "no", "n", "f", "0"):
        return False
    raise argparse.ArgumentTypeError("expected True or False")


class CommandParser(argparse.ArgumentParser):
    """An argument parser that collects problems instead of exiting at the first one.

    ``parse_args`` raises a ``UsageError`` with all problems. ``collect`` returns what could be parsed, so that a
    command can report further problems with them. The parsers of subcommands are of the same class.

    Attributes:
        other_names: Flags of other programs that no measure of similarity finds, and the flag to use.
        problems: One line for each problem of the last command line.
        faulty: ``dest`` of each flag that has a problem.
    """

    other_names: ClassVar[Mapping[str, str]] = {}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.problems: list[str] = []
        self.faulty: set[str] = set()
        self._options: dict[str, argparse.Action] = {}
        self._arguments: list[argparse.Action] = []
        self._subcommands: Any = None
        self._parsing = False
        super().__init__(*args, **{"allow_abbrev": False, "exit_on_error": False, **kwargs})

    @property
    def arguments(self) -> Sequence[argparse.Action]:
        """All arguments, in the order in which they were added."""
        return self._arguments

    def add_argument(self, *names: Any, **options: Any) -> argparse.Action:
        """Add an argument; the values of a flag are converted and checked by this class."""
        return self._add(super().add_argument, names, options)

    def subject(self, title: str) -> Callable[..., argparse.Action]:
        """Return an ``add_argument`` whose arguments ``--help`` shows under a title."""
        group = self.add_argument_group(title)
        return lambda *names, **options: self._add(group.add_argument, names, options)

    def _add(
        self, add: Callable[..., argparse.Action], names: Sequence[Any], options: dict[str, Any]
    ) -> argparse.Action:
        if names[0].startswith("-") and options.get("action", "store") == "store":
            choices = options.pop("choices", None)
            if choices is not None:
                options["metavar"] = "{" + ",".join(map(str, choices)) + "}"
            options["type"] = self._collecting(names[0], options.get("type", str), choices)
        action = add(*names, **options)
        self._options |= dict.fromkeys(action.option_strings, action)
        self._arguments.append(action)
        return action

    def add_subparsers(self, **options: Any) -> Any:
        """Add subcommands; one of them is required."""
        self._subcommands = super().add_subparsers(**{"dest": "command", "required": True, **options})
        return self._subcommands

    def expected_of(self, convert: Any) -> str | None:
        """Return what the values of a ``type`` are; None if its ``ArgumentTypeError`` says what is expected."""
        return {int: "a whole number", float: "a number"}.get(convert)

    def require(self, flag: str) -> None:
        """Make a flag required that has been added as an optional one."""
        self._options[flag].required = True

    def collect(self, args: Sequence[str] | None = None, namespace: Any = None) -> argparse.Namespace:
        """Parse a command line without stopping at the first problem.

        Args:
            args: Arguments without the program's name; ``sys.argv`` by default.
            namespace: Takes the values; by default a new one.

        Returns:
            The values; a flag with a problem has its default.

        Raises:
            UsageError: A subcommand has problems.
        """
        self.problems, self.faulty = [], set()
        tokens = sys.argv[1:] if args is None else list(args)
        found = argparse.Namespace() if namespace is None else namespace
        if self._subcommands is not None and not self._names_subcommand(tokens):
            return found
        self._parsing = True
        try:
            unknown = self._parse(tokens, found)
        finally:
            self._parsing = False
        self._note_unknown(unknown)
        for action in self._arguments:
            if action.required and not getattr(found, action.dest, None) and action.dest not in self.faulty:
                self._note(action, f"{_name(action)} is required")
        for name in self.faulty:
            setattr(found, name, self.get_default(name))
        return found

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse a command line; there are no unknown arguments in the result, because they are problems."""
        found = self.collect(args, namespace)
        if self.problems:
            raise problems_error(self.problems, self.usage_line())
        return found, []

    def error(self, message: str) -> NoReturn:
        """Raise a ``UsageError``."""
        if self._parsing:
            raise argparse.ArgumentError(None, message)  # as newer releases of argparse do
        raise UsageError(message, self.usage_line())

    def usage_line(self) -> str:
        """Return a usage of one line: the required arguments. The usage of all flags is longer than any message."""
        if self._subcommands is not None:
            return f"usage: {self.prog} SUBCOMMAND ... (--help describes the subcommands)"
        needed = [
            f"{_name(action)} {_metavar(action)}" if action.option_strings else _metavar(action)
            for action in self._arguments
            if action.required
        ]
        return f"usage: {' '.join([self.prog, *needed])} ... (--help lists all flags)"

    def _parse(self, tokens: list[str], found: argparse.Namespace) -> Sequence[str]:
        # Fills the namespace and returns the unknown tokens.
        while True:
            try:
                return super().parse_known_args(tokens, found)[1]
            except argparse.ArgumentError as error:
                flags = [flag for flag in str(error.argument_name).split("/") if flag in self._options]
                if not flags:  # required arguments are missing
                    return [token for token in tokens if token.startswith("--") and token != "--"]
                self._note(self._options[flags[0]], f"{_name(self._options[flags[0]])}: {error.message}")
                tokens = [token for token in tokens if token.partition("=")[0] not in flags]

    def _names_subcommand(self, tokens: Sequence[str]) -> bool:
        names = list(self._subcommands.choices)
        name = next((token for token in tokens if not token.startswith("-")), None)
        if name in names or (name is None and {"-h", "--help"} & set(tokens)):
            return True
        self._note_unknown([token for token in tokens if token.startswith("-")])
        if name is None:
            self.problems.append(f"a subcommand is missing; expected one of {', '.join(names)}")
        else:
            hint = did_you_mean(name, names) or f"expected one of {', '.join(names)}"
            self.problems.append(f"{name!r} is not a subcommand; {hint}")
        return False

    def _collecting(self, flag: str, convert: Callable[[str], Any], choices: Sequence[Any] | None) -> Any:
        def checked(text: str) -> Any:
            expected = f"one of {', '.join(map(str, choices))}" if choices else self.expected_of(convert)
            reason = f"expected {expected or 'another value'}"
            try:
                value = convert(text)
                if choices is None or value in choices:
                    return value
            except (argparse.ArgumentTypeError, ValueError, TypeError) as error:
                if expected is None:
                    reason = str(error)
            action = self._options[flag]
            self._note(action, f"{_name(action)} {text}: {reason}")
            return None

        return checked

    def _note(self, action: argparse.Action, problem: str) -> None:
        self.faulty.add(action.dest)
        if problem not in self.problems:  # a command line may be parsed several times
            self.problems.append(problem)

    def _note_unknown(self, tokens: Sequence[str]) -> None:
        after_flag = False
        for token in tokens:
            flag = token.partition("=")[0]
            if not token.startswith("-"):
                if not after_flag:
                    self.problems.append(f"{token!r} does not belong to a flag")
            elif flag not in self._options:
                hint = self._did_you_mean(flag)
                self.problems.append(f"{flag} is not a flag" + (f"; {hint}" if hint else ""))
            after_flag = token.startswith("-")

    def _did_you_mean(self, flag: str) -> str | None:
        spelled = f"--{flag.lstrip('-').replace('-', '_').lower()}"
        if spelled in self.other_names:
            return f"did you mean {self.other_names[spelled]}?"
        return did_you_mean(spelled, [name for name in self._options if name.startswith("--") and "-" not in name[2:]])


def problems_error(problems: Sequence[str], usage: str | None = None) -> UserError:
    """Combine the problems of a command line into one error.

    Args:
        problems: At least one.
        usage: The command's usage line, if the command line cannot be parsed.
    """
    heading = [f"{len(problems)} problems were found; nothing was started:"] if len(problems) > 1 else []
    message = "\n  ".join([*heading, *problems])
    return UserError(message) if usage is None else UsageError(message, usage)


def _name(action: argparse.Action) -> str:
    long = [option for option in action.option_strings if option.startswith("--")]
    return next(iter([*long, *action.option_strings]), _metavar(action))


def _metavar(action: argparse.Action) -> str:
    return str(action.metavar or action.dest.upper())
