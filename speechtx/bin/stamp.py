"""Tells whether a stage's inputs changed since it finished (utils/stages.sh calls it; recipes need not).

`begin` compares the inputs with those of the stamp file and prints one line: `skip DATE`, `first`, `interrupted`,
`extended WHAT` (only --soft keys changed), `changed WHAT` (also if WHAT is a --result that something else wrote over) or
`missing OUTPUT`. Unless it prints `skip`, it also records that the stage is running, so that a stage which fails or is killed
runs again. `end` records that it finished. `named` only prints the files that --config names in the keys --names.

A file counts by its content (above 256 MiB by size and time), a folder by its files. Of YAML files only the named keys count,
comments and order do not. A missing file is an input too: it may appear later.

example: speechtx stamp begin --stamp exp/a/.stamps/train.json --in data/train/text --config conf/train.yaml:model,training
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path

from speechtx.config.atomic import write_text
from speechtx.config.errors import ConfigError

HASHED_BYTES = 256 << 20  # a second's work; larger files (archives) count by size and modification time, which a copy changes
_KEY = re.compile(r"^(\s*)(?:'([^']+)'|\"([^\"]+)\"|([^\s#'\"-][^:#]*?))\s*:(?:\s+(.*))?$")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=("begin", "end", "named"))
    parser.add_argument("--stamp", type=Path, metavar="FILE", help="where the stage's inputs are recorded")
    parser.add_argument(
        "--in", dest="inputs", type=Path, action="append", default=[], metavar="PATH", help="a file or folder it reads"
    )
    parser.add_argument("--out", type=Path, action="append", default=[], metavar="PATH", help="what must exist if it finished")
    parser.add_argument(
        "--result",
        dest="results",
        type=Path,
        action="append",
        default=[],
        metavar="PATH",
        help="a file it writes that must still be as the stage left it, because others write it too",
    )
    parser.add_argument(
        "--after", type=Path, action="append", default=[], metavar="STAMP", help="stage that must not have run since"
    )
    parser.add_argument(
        "--config", action="append", default=[], metavar="FILE[:KEYS]", help="a YAML file, or some of its sections"
    )
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help="override of the last --config"
    )
    parser.add_argument(
        "--names",
        action="append",
        default=[],
        metavar="KEY",
        help="a key of the last --config that names a file or folder it reads",
    )
    parser.add_argument(
        "--soft", action="append", default=[], metavar="KEY", help="a change of this key lets the stage continue its work"
    )
    parser.add_argument("--value", action="append", default=[], metavar="NAME=VALUE", help="any other setting that matters")
    parser.add_argument("--force", action="store_true", help="never print skip")


def run(args: argparse.Namespace) -> int:
    if args.action == "named":
        paths = (path for config in args.config for path in named_paths(Path(config), args.names, args.overrides))
        print("\n".join(paths))
        return 0
    if args.stamp is None:
        raise ConfigError("--stamp: no file was given")
    if args.action == "end":
        stamp = read_stamp(args.stamp)
        if stamp is None:
            raise ConfigError(f"{args.stamp}: no such stamp; `begin` writes it")
        left = {name: path_digest(Path(name)) for name in stamp.get("results", {})}
        now = datetime.now().isoformat(sep=" ", timespec="milliseconds")
        write_stamp(args.stamp, stamp["inputs"], results=left, finished=now)
        return 0
    inputs = fingerprint(args)
    answer = compare(read_stamp(args.stamp), inputs, soft=args.soft, outputs=args.out)
    if args.force and answer.startswith("skip"):
        answer = "changed --force"
    if not answer.startswith("skip"):
        args.stamp.parent.mkdir(parents=True, exist_ok=True)
        write_stamp(args.stamp, inputs, results=dict.fromkeys(map(str, args.results), ""), finished="")
    print(answer)
    return 0


def compare(stamp: dict | None, inputs: dict[str, str], *, soft: Sequence[str] = (), outputs: Sequence[Path] = ()) -> str:
    """The line that `begin` prints; see the module's docstring."""
    if stamp is None:
        return "first"
    old: dict[str, str] = stamp["inputs"]
    changed = sorted(name for name in old.keys() | inputs.keys() if old.get(name) != inputs.get(name))
    if changed:
        hard = [name for name in changed if not any(_within(name.split(" in ")[0], key) for key in soft)]
        shown = hard or changed
        more = f" and {len(shown) - 3} more" if len(shown) > 3 else ""
        return f"{'changed' if hard else 'extended'} {', '.join(shown[:3])}{more}"
    if not stamp["finished"]:
        return "interrupted"
    gone = [path for path in outputs if not path.exists()]
    if gone:
        return f"missing {gone[0]}"
    overwritten = [name for name, left in stamp.get("results", {}).items() if path_digest(Path(name)) != left]
    return f"changed {', '.join(overwritten)}" if overwritten else f"skip {stamp['finished']}"


def fingerprint(args: argparse.Namespace) -> dict[str, str]:
    """Everything the stage depends on: a name people understand -> a digest of its state."""
    found = {str(path): path_digest(path) for path in args.inputs}
    for i, config in enumerate(args.config):
        name, _, keys = config.partition(":")
        overrides = args.overrides if i == len(args.config) - 1 else []
        found |= {f"{key} in {name}": value for key, value in config_values(Path(name), keys, overrides).items()}
        if i == len(args.config) - 1:
            found |= {path: path_digest(Path(path)) for path in named_paths(Path(name), args.names, overrides)}
    for path in args.after:
        stamp = read_stamp(path)
        found[f"stage {path.stem}"] = stamp["finished"] if stamp else ""
    for value in args.value:
        name, _, text = value.partition("=")
        found[f"--{name}"] = text
    return found


def path_digest(path: Path) -> str:
    """A digest of a file's or folder's content; `absent` if there is none."""
    if path.is_dir():
        digest = hashlib.sha256()
        for file in sorted(f for f in path.rglob("*") if f.is_file() and "__pycache__" not in f.parts):
            digest.update(f"{file.relative_to(path)}\0{path_digest(file)}\0".encode())
        return digest.hexdigest()
    try:
        state = path.stat()
        if state.st_size > HASHED_BYTES:
            return f"{state.st_size} bytes of {state.st_mtime_ns}"
        with path.open("rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest()
    except FileNotFoundError:
        return "absent"


def config_values(path: Path, keys: str, overrides: Sequence[str] = ()) -> dict[str, str]:
    """The values of a block-style YAML file by dotted key, as written, without loading a YAML library.

    Args:
        path: the file; one that is missing has no values.
        keys: comma-separated prefixes to keep (`model,training.average`); empty keeps all.
        overrides: `key.path=value`, which replace what the file says.
    """
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    values: dict[str, str] = {}
    for key, value in _yaml_lines(text):
        values[key] = f"{values[key]}\n{value}" if key in values else value
    values = {key: value for key, value in values.items() if value}  # a section's own line says nothing
    for override in overrides:
        key, _, value = override.partition("=")
        values = {name: old for name, old in values.items() if not _within(name, key)}
        values[key.strip()] = value.strip()
    wanted = [key for key in keys.split(",") if key]
    if not wanted or re.search(r"(^|\s)(<<:|[&*]\w)", text):  # an anchor lets one section depend on another
        return values
    return {name: value for name, value in values.items() if any(_within(name, key) for key in wanted)}


def named_paths(path: Path, keys: Sequence[str], overrides: Sequence[str] = ()) -> list[str]:
    """The files and folders that a configuration names in these keys; a key that is not there names none.

    Raises:
        ConfigError: a key lies in a section in flow style, `{key: value}`, which is not read here.
    """
    values = config_values(path, "", overrides)
    found = []
    for key in keys:
        for name, value in values.items():
            if key.startswith(f"{name}.") and value.startswith("{"):
                raise ConfigError(f"{path}: {name}: write it as a block, a key a line: recipes watch the file that {key} names")
        value = values.get(key, "").strip("'\"")
        if value not in ("", "null", "~"):
            found.append(value)
    return found


def _yaml_lines(text: str) -> Iterator[tuple[str, str]]:
    """(dotted key, value as written) of every line that is not a comment; list items belong to the key above them."""
    stack: list[tuple[int, str]] = []
    for line in text.splitlines():
        line = line.rstrip()
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = _KEY.match(line)
        if match is None:
            yield ".".join(key for _, key in stack), _without_comment(line.strip())
            continue
        indent = len(match[1])
        while stack and stack[-1][0] >= indent:
            stack.pop()
        stack.append((indent, match[2] or match[3] or match[4]))
        yield ".".join(key for _, key in stack), _without_comment(match[5] or "")


def _without_comment(value: str) -> str:
    """Drops a trailing comment; quoted values are kept whole, since a # may belong to them."""
    if value.startswith("#"):
        return ""
    return value if value[:1] in ("'", '"') else re.split(r"\s#", value)[0].rstrip()


def _within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(f"{prefix}.")


def read_stamp(path: Path) -> dict | None:
    """The stamp file's content; None if there is none, or none that can be read: the stage then runs again."""
    try:
        stamp = json.loads(path.read_text(encoding="utf-8"))
        return stamp if isinstance(stamp["inputs"], dict) and isinstance(stamp["finished"], str) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_stamp(path: Path, inputs: dict[str, str], *, results: dict[str, str], finished: str) -> None:
    """Records inputs and digests of --result files; `finished` is the date, empty while the stage runs."""
    stamp = {"finished": finished, "inputs": inputs} | ({"results": results} if results else {})
    write_text(path, json.dumps(stamp, indent=1, ensure_ascii=False) + "\n")
