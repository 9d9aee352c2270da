"""Shell completion, made from the argument parser: it cannot fall behind the commands.

Always holds: names from the cluster are only ever data. They are never expanded by the shell while
it looks for completions, and are quoted when they get onto the command line.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import NamedTuple

from sheepfs_tools.sheepctl.commandline.areas import ANY, NODE, SNAPSHOT, TRASH, VDI, completes

_LISTS = {
    VDI: ("sheepctl vdi list --names",),
    SNAPSHOT: ("sheepctl snapshot list --names",),
    ANY: ("sheepctl vdi list --names", "sheepctl snapshot list --names"),
    TRASH: ("sheepctl trash list --ids",),
    NODE: ("sheepctl node list --ids",),
}
"""What gives the names, one a line."""

_BASH = """# sheepctl completion: put this into ~/.bashrc:  eval "$(sheepctl completion bash)"
_sheepctl() {{
    local current command= word cut= i
    current=${{COMP_LINE:0:$COMP_POINT}}
    current=${{current##*[[:space:]]}}
    # bash takes vm1@daily for three words, and replaces the last one only.
    if [[ $COMP_WORDBREAKS == *@* && $current == *@* ]]; then cut=${{current%@*}}@; fi
    for ((i = 1; i < COMP_CWORD; i++)); do
        word=${{COMP_WORDS[i]}}
        case $word in
        --etcd | --cluster) ((i++)) ;;
        -*) ;;
        *) command="${{command:+$command }}$word" ;;
        esac
    done
    COMPREPLY=()
    while IFS= read -r word; do
        if [[ -n $word && $word == "$current"* ]]; then
            COMPREPLY+=("$(printf %q "${{word#"$cut"}}")")
        fi
    done < <(
        case $command in
{cases}
        esac
    )
}}
complete -F _sheepctl sheepctl
"""


_FISH_START = """# sheepctl completion fish > ~/.config/fish/completions/sheepctl.fish
function __sheepctl_words
    set -l skip 0
    for word in (commandline -opc)[2..-1]
        if test $skip = 1
            set skip 0
        else if contains -- $word --etcd --cluster
            set skip 1
        else if not string match -q -- '-*' $word
            echo $word
        end
    end
end
function __sheepctl_exactly
    set -l words (__sheepctl_words)
    test "$words" = "$argv"
end
function __sheepctl_inside
    set -l words (__sheepctl_words)
    set -l depth (count $argv)
    test "$words[1..$depth]" = "$argv"
end
complete -c sheepctl -f"""


class Level(NamedTuple):
    """One level of the command line."""

    path: tuple[str, ...]
    words: list[str]
    """Commands, or the choices of an argument."""
    options: list[str]
    lists: tuple[str, ...]
    """Commands that list what its arguments may name."""


def levels(parser: argparse.ArgumentParser, path: tuple[str, ...] = ()) -> Iterator[Level]:
    """Yield each level of the command line, the innermost first."""
    words: list[str] = []
    options: list[str] = []
    lists: list[str] = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            words += list(action.choices)
            for name, child in action.choices.items():
                yield from levels(child, (*path, name))
        elif action.option_strings:
            options += [text for text in action.option_strings if text.startswith("--")]
        elif action.choices:
            words += [str(choice) for choice in action.choices]
        else:
            lists += [line for line in _LISTS.get(completes(action), ()) if line not in lists]
    yield Level(path, words, options, tuple(lists))


def completion(parser: argparse.ArgumentParser, shell: str) -> str:
    """Give the script for a shell."""
    if shell == "fish":
        return _fish(list(levels(parser)))
    cases = []
    for path, words, options, lists in levels(parser):
        pattern = f'"{" ".join(path)}"' + ("*" if lists else "")
        commands = [f"printf '%s\\n' {' '.join([*words, *options])}"]
        commands += [f"{line} 2>/dev/null" for line in lists]
        cases.append(f"        {pattern}) {'; '.join(commands)} ;;")
    script = _BASH.format(cases="\n".join(cases))
    if shell == "zsh":
        return "autoload -Uz bashcompinit && bashcompinit\n" + script
    return script


def _fish(all_levels: list[Level]) -> str:
    lines = [_FISH_START]
    for path, words, options, lists in all_levels:
        # After a command with arguments anything may stand; before one, only what leads to it.
        inside = "exactly" if words else "inside"
        start = f"complete -c sheepctl -n '__sheepctl_{inside} {' '.join(path)}'"
        if words:
            lines.append(f"{start} -a '{' '.join(words)}'")
        lines += [f"{start} -l {option[2:]}" for option in options]
        lines += [f"{start} -a '({line} 2>/dev/null)'" for line in lists]
    return "\n".join(lines) + "\n"
