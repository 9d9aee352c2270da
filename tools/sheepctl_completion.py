"""Shell completion, made from the argument parser: it cannot fall behind the commands."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

SHELLS = ("bash", "zsh", "fish")

_VDIS = "sheepctl vdi list --names 2>/dev/null"

_BASH = """# sheepctl completion: put this into ~/.bashrc:  eval "$(sheepctl completion bash)"
_sheepctl() {{
    local current=${{COMP_WORDS[COMP_CWORD]}} path= word i
    for ((i = 1; i < COMP_CWORD; i++)); do
        word=${{COMP_WORDS[i]}}
        case $word in
        --etcd | --cluster) ((i++)) ;;
        -*) ;;
        *) path="${{path:+$path }}$word" ;;
        esac
    done
    local words=
    case $path in
{cases}
    esac
    COMPREPLY=($(compgen -W "$words" -- "$current"))
}}
complete -F _sheepctl sheepctl
"""


def commands(
    parser: argparse.ArgumentParser, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], list[str], list[str], bool]]:
    """Yield (path, subcommands, options, takes a VDI name) for each level of the command line."""
    subcommands: list[str] = []
    options: list[str] = []
    takes_vdi = False
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            subcommands += list(action.choices)
            for name, child in action.choices.items():
                yield from commands(child, (*path, name))
        elif action.option_strings:
            options += [text for text in action.option_strings if text.startswith("--")]
        elif action.choices:
            subcommands += [str(choice) for choice in action.choices]
        elif action.dest == "name" and path != ("vdi", "create"):
            takes_vdi = True
    yield path, subcommands, options, takes_vdi


def completion(parser: argparse.ArgumentParser, shell: str) -> str:
    """Give the script for a shell."""
    levels = list(commands(parser))
    if shell == "fish":
        return _fish(levels)
    cases = []
    for path, subcommands, options, takes_vdi in levels:
        pattern = f'"{" ".join(path)}"' + ("*" if takes_vdi else "")
        words = " ".join([*subcommands, *options]) + (f" $({_VDIS})" if takes_vdi else "")
        cases.append(f'    {pattern}) words="{words}" ;;')
    script = _BASH.format(cases="\n".join(cases))
    if shell == "zsh":
        return "autoload -Uz bashcompinit && bashcompinit\n" + script
    return script


def _fish(levels: list[tuple[tuple[str, ...], list[str], list[str], bool]]) -> str:
    lines = [
        "# sheepctl completion fish > ~/.config/fish/completions/sheepctl.fish",
        "complete -c sheepctl -f",
    ]
    for path, subcommands, options, takes_vdi in levels:
        conditions = [f"__fish_seen_subcommand_from {word}" for word in path]
        if subcommands:
            conditions.append(f"not __fish_seen_subcommand_from {' '.join(subcommands)}")
        start = "complete -c sheepctl -n '" + ("; and ".join(conditions) or "true") + "'"
        if subcommands:
            lines.append(f"{start} -a '{' '.join(subcommands)}'")
        lines += [f"{start} -l {option[2:]}" for option in options]
        if takes_vdi:
            lines.append(f"{start} -a '({_VDIS})'")
    return "\n".join(lines) + "\n"
