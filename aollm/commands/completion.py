"""`aollm completion`: a script by which bash, zsh or fish completes commands, options and the words that these take.

The scripts are written out of the parser's own tables, and nothing of aollm runs while somebody types.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..options import MODELS, known
from ..parser import Parser, parsers
from ..terminal import Terminal

FOLDERS, FILES = ("FOLDER", "DIR"), ("FILE",)


@dataclass(frozen=True, slots=True)
class Slot:
    """What may be typed at one place: an option by its `flags`, or without any the next word. `takes` is what its value is called."""

    flags: tuple[str, ...]
    help: str
    takes: str
    words: tuple[str, ...]
    again: bool


@dataclass(frozen=True, slots=True)
class Command:
    """A command, or one of its actions: `path` is `models ls`. `below` has the names of what may follow, if any."""

    path: str
    help: str
    slots: tuple[Slot, ...]
    below: tuple[str, ...]

    @property
    def options(self) -> list[Slot]:
        """Those with flags."""
        return [slot for slot in self.slots if slot.flags]

    @property
    def arguments(self) -> list[Slot]:
        """Those without, in their order."""
        return [slot for slot in self.slots if not slot.flags]


def main(terminal: Terminal, options: Mapping[str, Any]) -> int:
    """Print the script."""
    terminal.text(SCRIPTS[options["shell"]](list(commands(parsers()[0]))))
    return 0


def commands(parser: Parser, path: str = "", help: str = "") -> Iterator[Command]:
    """The commands of `parser`, itself first, whose path is empty for `aollm` alone."""
    slots: list[Slot] = []
    below: dict[str, tuple[Parser, str]] = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            helps = {choice.dest: choice.help or "" for choice in action._choices_actions}
            below = {name: (made, helps[name]) for name, made in action.choices.items()}
        elif action.help is not argparse.SUPPRESS:
            slots.append(_slot(action))
    yield Command(path, help, tuple(slots), tuple(below))
    for name, (made, told) in below.items():
        yield from commands(made, f"{path} {name}".strip(), told)


def _slot(action: argparse.Action) -> Slot:
    option = known(action.dest)
    few = MODELS if action.dest == "model" else option.words if option is not None else ()
    words = tuple(str(choice) for choice in action.choices or few)
    takes = str(action.metavar or "") if action.nargs != 0 else ""
    return Slot(tuple(action.option_strings), str(action.help or ""), takes, words, isinstance(action, argparse._AppendAction))


def _bash(tree: Sequence[Command]) -> str:
    options = {flag: slot for command in tree for slot in command.options for flag in slot.flags if slot.takes}
    values: dict[str, list[str]] = {}
    for flag, slot in options.items():
        values.setdefault(_bash_value(slot), []).append(flag)
    lines = [f"            {'|'.join(flags)}) {what} ;;" for what, flags in values.items()]
    inner = "|".join(f"'{command.path}'" for command in tree if command.below)
    flags = [
        f"            '{command.path}') words='{' '.join(flag for slot in command.options for flag in slot.flags)}' ;;" for command in tree
    ]
    places = [f"            '{command.path}:0') words='{' '.join(command.below)}' ;;" for command in tree if command.below]
    for command in tree:
        for number, slot in enumerate(command.arguments):
            if slot.words:
                also = " kind=folder" if slot.takes == "MODEL" else ""
                places.append(f"            '{command.path}:{number}') words='{' '.join(slot.words)}'{also} ;;")
    return BASH.format(takes="|".join(options), values="\n".join(lines), inner=inner, flags="\n".join(flags), places="\n".join(places))


def _bash_value(slot: Slot) -> str:
    if slot.words:
        return f"words='{' '.join(slot.words)}'"
    return "kind=folder" if slot.takes in FOLDERS else "kind=file" if slot.takes in FILES else "return"


BASH = """\
# completion of aollm for bash, printed by: aollm completion bash
_aollm() {{
    local IFS=$' \\t\\n' cur=${{COMP_WORDS[COMP_CWORD]}} prev=${{COMP_WORDS[COMP_CWORD-1]}} path= words= kind= word i count=0
    if [[ $cur == = ]]; then cur=; elif [[ $prev == = ]]; then prev=${{COMP_WORDS[COMP_CWORD-2]}}; fi
    for ((i = 1; i < COMP_CWORD; i++)); do
        word=${{COMP_WORDS[i]}}
        case $word in
            {takes}) ((i++)); [[ ${{COMP_WORDS[i]}} == = ]] && ((i++)) ;;
            -*|=) ;;
            *) case $path in
                {inner}) path=${{path:+$path }}$word ;;
                *) ((count++)) ;;
            esac ;;
        esac
    done
    case $prev in
{values}
        *) case $cur in
            -*) case $path in
{flags}
            esac ;;
            *) case $path:$count in
{places}
            esac ;;
        esac ;;
    esac
    IFS=$'\\n'
    COMPREPLY=($(IFS=' '; compgen -W "$words" -- "$cur"))
    case $kind in
        folder) compopt -o filenames 2> /dev/null; COMPREPLY+=($(compgen -d -- "$cur")) ;;
        file) compopt -o filenames 2> /dev/null; COMPREPLY+=($(compgen -f -- "$cur")) ;;
    esac
}}
complete -F _aollm aollm
"""


def _zsh(tree: Sequence[Command]) -> str:
    by_path = {command.path: command for command in tree}
    body = "\n".join(_zsh_function(command, by_path) for command in reversed(tree))
    return f"#compdef aollm\n# completion of aollm for zsh, printed by: aollm completion zsh\n{ZSH_MODEL}{body}\n{ZSH_END}"


def _zsh_function(command: Command, by_path: Mapping[str, Command]) -> str:
    specs = [_zsh_option(slot, flag) for slot in command.options for flag in slot.flags]
    if not command.below:
        specs += [f"{number}:{slot.takes}:{_zsh_value(slot)}" for number, slot in enumerate(command.arguments, 1)]
        return f"{_zsh_name(command.path)}() {{\n    _arguments -s {_zsh_quoted(specs)}\n}}"
    below = [by_path[f"{command.path} {name}".strip()] for name in command.below]
    names = [f"{_zsh_plain(each.path.split()[-1])}:{_zsh_plain(each.help)}" for each in below]
    cases = "\n".join(f"            {each.path.split()[-1]}) {_zsh_name(each.path)} ;;" for each in below)
    specs += ["1:command:->command", "*::argument:->argument"]
    return (
        f"{_zsh_name(command.path)}() {{\n    local curcontext=$curcontext state line\n    local -a names\n"
        f"    names=({_zsh_quoted(names)})\n    _arguments -C {_zsh_quoted(specs)}\n    case $state in\n"
        f"        command) _describe command names ;;\n        argument) case $line[1] in\n{cases}\n        esac ;;\n    esac\n}}"
    )


def _zsh_option(slot: Slot, flag: str) -> str:
    many = "*" if slot.again else ""
    value = f":{slot.takes}:{_zsh_value(slot)}" if slot.takes else ""
    equals = "=" if slot.takes and flag.startswith("--") else ""
    return f"{many}{flag}{equals}[{_zsh_plain(slot.help)}]{value}"


def _zsh_value(slot: Slot) -> str:
    if slot.takes == "MODEL":
        return "_aollm_a_model"
    if slot.words:
        return f"({' '.join(slot.words)})"
    return "_directories" if slot.takes in FOLDERS else "_files" if slot.takes in FILES else " "


def _zsh_name(path: str) -> str:
    return "_" + "_".join(["aollm", *path.split()])


def _zsh_plain(text: str) -> str:
    """Without what has a meaning in the tables of `_arguments` and `_describe`."""
    return text.replace("\\", "").replace(":", "\\:").replace("[", "(").replace("]", ")")


def _zsh_quoted(texts: Sequence[str]) -> str:
    return " \\\n        ".join(_quoted(text) for text in texts)


ZSH_MODEL = f"""\
_aollm_a_model() {{
    _alternative 'names:alias:({" ".join(MODELS)})' 'folders:folder:_directories'
}}
"""
ZSH_END = """\
if [[ ${funcstack[1]} == _aollm ]]; then _aollm "$@"; else compdef _aollm aollm; fi
"""


def _fish(tree: Sequence[Command]) -> str:
    lines = ["# completion of aollm for fish, printed by: aollm completion fish", FISH, "complete -c aollm -f"]
    for command in tree:
        here = f"-n '__aollm_is {command.path}'" if command.path else "-n __aollm_is"
        by_path = {each.path: each.help for each in tree}
        for name in command.below:
            told = by_path[f"{command.path} {name}".strip()]
            lines.append(f"complete -c aollm {here} -a {name} -d {_quoted(told)}")
        lines += [f"complete -c aollm {here} {' '.join(_fish_option(slot))} -d {_quoted(slot.help)}" for slot in command.options]
        for slot in command.arguments:
            if slot.words:
                folders = " (__fish_complete_directories)" if slot.takes == "MODEL" else ""
                lines.append(f"complete -c aollm {here} -a {_quoted(' '.join(slot.words) + folders)}")
    return "\n".join(lines) + "\n"


def _fish_option(slot: Slot) -> Iterator[str]:
    for flag in slot.flags:
        yield f"-l {flag[2:]}" if flag.startswith("--") else f"-s {flag[1:]}"
    if slot.words:
        yield f"-x -a {_quoted(' '.join(slot.words))}"
    elif slot.takes in FOLDERS:
        yield "-x -a '(__fish_complete_directories)'"
    elif slot.takes in FILES:
        yield "-r -F"
    elif slot.takes:
        yield "-x"


FISH = """\
function __aollm_is
    set -l words (commandline -opc)
    set -e words[1]
    set -l path
    for word in $words
        string match -q -- '-*' $word; and break
        set -a path $word
        contains -- "$path" models cache config; or break
    end
    test "$path" = "$argv"
end"""


def _quoted(text: str) -> str:
    """As bash, zsh and fish all read it: what is between single quotes, and those within by themselves."""
    return "'" + text.replace("'", "'\\''") + "'"


SCRIPTS: dict[str, Callable[[Sequence[Command]], str]] = {"bash": _bash, "zsh": _zsh, "fish": _fish}
