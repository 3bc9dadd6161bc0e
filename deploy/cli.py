"""The `triptych` command: finds the part that is asked for and runs its module. Each part reads its own flags."""

from __future__ import annotations

import importlib.util
import runpy
import sys
from importlib.metadata import version

COMMANDS = {
    "up": ("deploy.up", "a whole deployment on this machine: engines and proxy"),
    "proxy": ("proxy", "the OpenAI-compatible front door to encode, prefill and decode servers"),
    "check": ("proxy.check", "say what would fail of a proxy's flags, files and engines, and what to do about it"),
    "key": ("proxy.auth.mint", "make an API key, and its entry for the proxy's --api-keys"),
    "plan": ("deploy.plan", "how busy a running proxy's engines are, and what one more would buy"),
    "top": ("deploy.top", "a running proxy in the terminal: engines, load, latest requests; /ui shows the same"),
    "bench": ("bench.load", "ask any OpenAI-compatible URL and measure its answers"),
    "encoder": ("engines.encoder", "a vision encoder engine"),
    "language": ("engines.language", "a language engine: prefill, decode, or both"),
    "store": ("engines.store", "a store of embeddings that encoders and language engines share"),
    "checkpoint": ("engines.checkpoint", "make a tiny random checkpoint to play with"),
}
COMPLETION = "completion"
NEEDS_ENGINES = ("up", "encoder", "language", "store", "checkpoint")
HELP = """\
usage: triptych COMMAND [flags]        (triptych COMMAND --help explains a command's flags)

{commands}

Start everything on this machine:
  triptych up
Or each part where it belongs (`triptych check` with the proxy's flags says beforehand what would fail):
  triptych encoder  --model DIR --port 8001 --transfer shm
  triptych language --model DIR --port 8002 --role prefill --transfer shm
  triptych language --model DIR --port 8003 --role decode  --transfer shm
  triptych proxy --encode-servers-urls http://HOST:8001 --prefill-servers-urls http://HOST:8002 \\
                 --decode-servers-urls http://HOST:8003 --port 8000
"""


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("--version", "-V"):
        print(f"triptych {version('triptych')}")
        return
    if name in ("--help", "-h", "help"):
        texts = {command: text for command, (_, text) in COMMANDS.items()}
        texts[COMPLETION] = "what bash, zsh or tcsh need to complete all this"
        print(HELP.format(commands="\n".join(f"  {command:<11} {text}" for command, text in texts.items())))
        return
    can_run_engines = importlib.util.find_spec("torch") is not None
    if name == COMPLETION:
        from deploy import completion

        completion.main(sys.argv[2:], {c: COMMANDS[c] for c in COMMANDS if can_run_engines or c not in NEEDS_ENGINES})
    if name not in COMMANDS:
        sys.exit(f"triptych: no command {name!r}; there are {', '.join([*COMMANDS, COMPLETION])}")
    if name in NEEDS_ENGINES and not can_run_engines:
        sys.exit(f"triptych {name} needs the engines' dependencies: pip install 'triptych[engines]'")
    sys.argv = [f"triptych {name}", *sys.argv[2:]]
    runpy.run_module(COMMANDS[name][0], run_name="__main__", alter_sys=False)


if __name__ == "__main__":
    main()
