"""Fuzzing: mutates files and watches what readers do with them.

A `Target` is a folder of small valid files and a function that reads it. Case number n of a target
changes one of the files, by a random generator of its own seeded with (SEED, n), and reads: one
number reproduces a case. Targets are read in child processes, since a library in C may crash or
hang: a child that dies is named with its case, and the next one goes on behind it. For that, and
since nothing here shrinks or learns, this is a plain generator rather than `hypothesis`.
"""

import collections
import contextlib
import dataclasses
import faulthandler
import gc
import importlib
import io
import json
import math
import multiprocessing
import multiprocessing.forkserver
import os
import re
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

SEED = 20261122

CPU_SECONDS = 5.0
"""Of all threads together, so that a machine with other work to do changes nothing."""
MEMORY_BYTES = 1 << 30
"""By how much a reader may make its process grow: in addresses, or else in pages (`_one_case`)."""
_MOST_ADDRESSES = 4 << 30
LONGEST_MESSAGE = 20_000
_BLOCKED_SECONDS = 60.0
_MOST_FAILURES = 5

_STANDARD_LIBRARY = (os.path.dirname(os.__file__), "<frozen")

Mutation = Callable[[np.random.Generator, Sequence[bytes]], bytes]


@dataclasses.dataclass(frozen=True)
class Target:
    """What to fuzz.

    Attributes:
      files: name in a folder -> valid contents; the first of each make up a valid folder.
      mutations: name -> how it is mutated; the others stay as they are.
      read: takes the path of the file that was changed; raises one of `errors` or ValueError or
        FileNotFoundError, with the folder or the file in the message, or gives something.
      check: says what is wrong with what `read` gave, or nothing.
    """

    files: Mapping[str, Sequence[bytes]]
    mutations: Mapping[str, Mutation]
    read: Callable[[Path], Any]
    check: Callable[[Any], str | None] = lambda content: None


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a target's cases; `failures` has a text for each that broke the rules."""

    cases: int
    accepted: int
    refused: int
    failures: tuple[str, ...]
    ms_per_case: float
    growth_mb: float

    def __str__(self) -> str:
        return (
            f"{self.cases} cases, {self.accepted} accepted, {self.refused} refused,"
            f" {self.ms_per_case:.2f} ms a case (of CPU), {self.growth_mb:.0f} MB more at most"
        )


# ---------------------------------------------------------------------------- mutations

_INTERESTING = (0, 1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 63, 64, 127, 128, 255, 256, 1024, 4095, 4096,
                32767, 32768, 65535, 65536, 2**24, 2**28, 2**30, 2**31 - 1, 2**31, 2**32 - 1,
                2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1)  # fmt: skip
_NUMBERS = (
    "nan", "-nan", "inf", "-inf", "1e309", "-1", "0", "-0.0", "1", "2", "3", "1e-400", "1e30",
    "1e-30", "99999999999999999999", "-99999999999999999999", "2147483648", "1e5", "1000000000",
    "0x10", "1_000", "٣", "", "1.", ".5", "+7", "1,5", "Infinity", "NaN", "9" * 5000,
)  # fmt: skip
_WORDS = ("", "\0", "\x1b[31m", "é", "\u2028", "\ud7ff", "'", '"', "\\", "/", "../../etc/passwd",
          "<script>", "$\\frac{$", "#", ":", "{", "}", "[", "]", "\r\n", "\x85", "\ufeff",
          "A" * 70_000, "[" * 20_000, '{"a":' * 5_000, "{ " * 5_000)  # fmt: skip
_TOKEN = re.compile(r"[^\W\d]\w*|[-+]?\.?\d[\w.+-]*|\s+|.", re.DOTALL)


def binary(rng: np.random.Generator, seeds: Sequence[bytes]) -> bytes:
    """Bits, bytes, numbers and pieces of one of the seeds are changed, up to eight times."""
    data = bytearray(seeds[rng.integers(len(seeds))])
    for _ in range(min(int(rng.geometric(0.5)), 8)):
        _change_bytes(rng, data, seeds)
    return bytes(data)


def _change_bytes(rng: np.random.Generator, data: bytearray, seeds: Sequence[bytes]) -> None:
    # Half of the changes near the beginning: there are the headers.
    size = len(data)
    reach = size if rng.random() < 0.5 else min(size, 512)
    at = int(rng.integers(reach + 1))
    length = int(min(size - at, 1 + rng.geometric(0.1 if rng.random() < 0.8 else 0.002)))
    match int(rng.integers(10)):
        case 0 | 1 if at < size:
            data[at] ^= 1 << int(rng.integers(8))
        case 2 if at < size:
            data[at] = int(rng.integers(256))
        case 3 | 4:
            width = 1 << int(rng.integers(4))
            value = _INTERESTING[rng.integers(len(_INTERESTING))] % (1 << 8 * width)
            order = "little" if rng.random() < 0.7 else "big"
            data[at : at + width] = value.to_bytes(width, order)
        case 5 if rng.random() < 0.5:
            del data[at:]
        case 5 | 6:
            del data[at : at + length]
        case 7:
            to = int(rng.integers(size + 1))
            data[to:to] = data[at : at + length] * int(rng.integers(1, 4))
        case 8:
            filling = rng.bytes(length) if rng.random() < 0.5 else bytes([255 * (at % 2)]) * length
            data[at : at + length * int(rng.random() < 0.5)] = filling
        case 9:
            other = seeds[rng.integers(len(seeds))]
            start = int(rng.integers(len(other) + 1))
            data[at : at + length] = other[start : start + length]


def text(rng: np.random.Generator, seeds: Sequence[bytes]) -> bytes:
    """Numbers, words and lines of a text are changed; one in five is changed as bytes are."""
    if rng.random() < 0.2:
        return binary(rng, seeds)
    tokens = _TOKEN.findall(seeds[rng.integers(len(seeds))].decode())
    for _ in range(min(int(rng.geometric(0.6)), 6)):
        _change_tokens(rng, tokens)
    return "".join(tokens).encode("utf-8", "surrogatepass")


def _change_tokens(rng: np.random.Generator, tokens: list[str]) -> None:
    def place() -> int:
        # Half of the changes near the beginning, as above.
        reach = len(tokens) if rng.random() < 0.5 else min(len(tokens), 400)
        return int(rng.integers(reach)) if reach else 0

    at, other = place(), place()
    match int(rng.integers(9)):
        case 0 | 1 | 2:
            numbers = [i for i in range(at, min(at + 200, len(tokens))) if tokens[i][-1:].isdigit()]
            if numbers:
                tokens[numbers[0]] = _NUMBERS[rng.integers(len(_NUMBERS))]
        case 3:
            tokens[at : at + 1] = []
        case 4:
            tokens[at:at] = tokens[at : at + 1 + int(rng.integers(8))]
        case 5:
            tokens[at : at + 1] = tokens[other : other + 1]
        case 6:
            tokens.insert(at, _WORDS[rng.integers(len(_WORDS))])
        case 7:
            lines = "".join(tokens).splitlines(True)
            i, j = (int(rng.integers(len(lines) + 1)) for _ in range(2))
            if rng.random() < 0.5:
                lines[i:i] = lines[j : j + int(rng.integers(1, 6))]
            else:
                del lines[i : i + int(rng.integers(1, 6))]
            tokens[:] = _TOKEN.findall("".join(lines))
        case 8:
            del tokens[at + 1 :]


_VALUES = (
    None, True, False, 0, -1, 1, 3, 0.5, -0.0, 1e30, 10**30, -(10**30), 2**31, 2**63, math.nan,
    math.inf, -math.inf, "", "x", "nan", "1", "../x", "A" * 5_000, "\ud800", "<b>", [], {}, [None],
    [[]], [1, 2, 3], ["a"], {"a": 1}, {"": {}}, [[1.0] * 3] * 17, 1e9, 10**9,
)  # fmt: skip


def json_object(rng: np.random.Generator, seeds: Sequence[bytes]) -> bytes:
    """Values of a JSON file become others; one in five is changed as texts are."""
    if rng.random() < 0.2:
        return text(rng, seeds)
    content = json.loads(seeds[rng.integers(len(seeds))])
    holder = {"": content}
    for _ in range(min(int(rng.geometric(0.6)), 5)):
        # Every level is as likely as the next.
        node, key = holder, ""
        while isinstance(node[key], (dict, list)) and node[key] and rng.random() < 0.75:
            node = node[key]
            key = int(rng.integers(len(node))) if isinstance(node, list) else _one_of(rng, node)
        match int(rng.integers(6)):
            case 0 if node is not holder:
                del node[key]
            case 1 if isinstance(node, dict) and node is not holder:
                node[str(_VALUES[rng.integers(len(_VALUES))])[:50]] = node.pop(key)
            case 2 if isinstance(node, list):
                node += node[key : key + 1]
            case 3:
                node[key] = [node[key]]
            case _:
                node[key] = json.loads(json.dumps(_VALUES[rng.integers(len(_VALUES))]))
    return json.dumps(holder[""]).encode("utf-8", "surrogatepass")


def json_lines(rng: np.random.Generator, seeds: Sequence[bytes]) -> bytes:
    """A file of one JSON object a line: one is changed, or the whole as a text."""
    lines = seeds[rng.integers(len(seeds))].splitlines(True)
    if rng.random() < 0.5:
        return text(rng, seeds)
    at = int(rng.integers(len(lines)))
    lines[at] = json_object(rng, [lines[at]]) + b"\n"
    return b"".join(lines)


def _one_of(rng: np.random.Generator, keys: Any) -> Any:
    return list(keys)[rng.integers(len(keys))]


def packed(
    unpack: Callable[[bytes], dict[str, bytes]],
    pack: Callable[[dict[str, bytes]], bytes],
    inner: Callable[[str], Mutation],
) -> Mutation:
    """Changes what lies in a container behind check sums, which are made anew; or the container.

    Args:
      unpack: container -> parts by name.
      pack: the inverse.
      inner: name of a part -> how it is mutated.
    """

    def mutate(rng: np.random.Generator, seeds: Sequence[bytes]) -> bytes:
        if rng.random() < 0.4:
            return binary(rng, seeds)
        containers = [unpack(seed) for seed in seeds]
        parts = dict(containers[rng.integers(len(containers))])
        name = _one_of(rng, parts)
        parts[name] = inner(name)(rng, [parts[name]])
        return pack(parts)

    return mutate


def unzip(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def zip_of(members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return content.getvalue()


def png_chunks(data: bytes) -> dict[str, bytes]:
    parts, at = {}, 8
    while at < len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        parts[f"{len(parts)} {data[at + 4 : at + 8].decode()}"] = data[at + 8 : at + 8 + length]
        at += 12 + length
    return parts


def png_of(parts: dict[str, bytes]) -> bytes:
    data = b"\x89PNG\r\n\x1a\n"
    for name, part in parts.items():
        kind = name.split()[1].encode()
        data += struct.pack(">I", len(part)) + kind + part
        data += struct.pack(">I", zlib.crc32(kind + part))
    return data


# ---------------------------------------------------------------------------- the guard


def run(module: str, name: str, cases: int, keep: Path, first: int = 0) -> Outcome:
    """Fuzzes one target in child processes.

    Args:
      module: the module whose `TARGETS` has the target's maker.
      name: the target's name.
      cases: how many.
      keep: folder for what made a reader fail.
      first: number of the first case.
    """
    scratch = Path(tempfile.mkdtemp(dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
    keep.mkdir(parents=True, exist_ok=True)
    progress = scratch / "progress"
    last = first + cases
    accepted = refused = 0
    growth_mb = cpu_seconds = 0.0
    failures: list[str] = []
    start = first
    try:
        while start < last and len(failures) < _MOST_FAILURES:
            progress.write_bytes(_PROGRESS.pack(start, 0, 0, 0.0, 0.0))
            child = _context().Process(
                target=_fuzz, args=(module, name, start, last, str(scratch), str(keep))
            )
            child.start()
            reached = _watch(child, progress)
            case, ok, bad, growth, seconds = _PROGRESS.unpack(progress.read_bytes())
            accepted, refused, growth_mb = accepted + ok, refused + bad, max(growth_mb, growth)
            cpu_seconds += seconds
            log = scratch / "failures"
            failures += log.read_text(errors="replace").split("\f")[:-1] if log.exists() else []
            log.unlink(missing_ok=True)
            start = case
            if child.exitcode == 0:
                break
            kept = _keep(scratch, keep, case)
            why = f"signal {-child.exitcode}" if child.exitcode < 0 else f"code {child.exitcode}"
            trace = (scratch / "trace").read_text(errors="replace")[:3000]
            failures.append(f"case {case} ended the process: {reached or why}; see {kept}\n{trace}")
            start = case + 1
    finally:
        shutil.rmtree(scratch)
    done = start - first
    ms = 1000 * cpu_seconds / max(done, 1)
    return Outcome(done, accepted, refused, tuple(failures), ms, growth_mb)


_PROGRESS = struct.Struct("qqqdd")
"""The case, how many were accepted and refused, growth in MB, seconds of CPU time."""


def _context() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_fuzz"])
    return context


def start_server() -> None:
    """Starts the process that children are forked from, in which the package is imported once."""
    here = os.path.dirname(os.path.abspath(__file__))
    path = os.pathsep.join([here, os.path.dirname(here), *sys.path])
    # Before Python 3.13.4 it imports before it is given this process's path. And it may not have
    # threads: they would not be in its forks.
    settings = {"PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    with mock.patch.dict(os.environ, settings):
        _context()
        multiprocessing.forkserver.ensure_running()


def _watch(child: Any, progress: Path) -> str:
    """Waits for a child; ends one that neither works nor goes on, and says so."""
    seen, since = b"", time.monotonic()
    while child.is_alive():
        child.join(0.2)
        if (now := progress.read_bytes()) != seen:
            seen, since = now, time.monotonic()
        elif time.monotonic() - since > _BLOCKED_SECONDS:
            child.kill()
            child.join()
            return f"it blocked for {_BLOCKED_SECONDS:.0f} s"
    child.join()
    return ""


def _keep(scratch: Path, keep: Path, case: int) -> Path:
    kept = keep / f"case_{case}"
    shutil.copytree(scratch / "files", kept, dirs_exist_ok=True)
    return kept


def _fuzz(module: str, name: str, first: int, last: int, scratch_name: str, keep: str) -> None:
    """The child: reads case after case and writes down how far it is."""
    sys.dont_write_bytecode = True
    scratch = Path(scratch_name)
    folder = scratch / "files"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    with (scratch / "trace").open("w") as trace:
        os.dup2(trace.fileno(), 2)
        target: Target = importlib.import_module(module).TARGETS[name]()
        for file, contents in target.files.items():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_bytes(contents[0])
        warnings.simplefilter("error")
        _warm_up(target, folder)
        faulthandler.enable(trace)
        faulthandler.register(signal.SIGPROF, trace, chain=True)
        watch = _AuditHook()
        grown = _limit_memory()
        progress = os.open(scratch / "progress", os.O_WRONLY)
        log = (scratch / "failures").open("a")
        counts = collections.Counter()
        files = len(os.listdir("/proc/self/fd"))
        failed = 0

        def told() -> tuple[int, int, float, float]:
            return counts["accepted"], counts["refused"], grown(), time.process_time()

        for case in range(first, last):
            os.pwrite(progress, _PROGRESS.pack(case, *told()), 0)
            problem = _one_case(target, folder, case, watch, counts)
            if problem:
                kept = _keep(scratch, Path(keep), case)
                log.write(f"case {case}: {problem}\nsee {kept}\f")
                log.flush()
                failed += 1
                if failed == _MOST_FAILURES:
                    break
        gc.collect()
        if (more := len(os.listdir("/proc/self/fd")) - files) > 8:
            log.write(f"the cases left {more} files open\f")
        if grown() * 1e6 > MEMORY_BYTES:
            log.write(f"the process grew by {grown():.0f} MB\f")
        log.close()
        os.pwrite(progress, _PROGRESS.pack(last, *told()), 0)
        trace.flush()
        # Without the threads' farewells: those of libraries were never made for forks.
        os._exit(0)


def _warm_up(target: Target, folder: Path) -> None:
    """Reads the valid folder, and each valid file: all of them must be accepted."""
    for name in target.mutations:
        for content in reversed(target.files[name]):
            (folder / name).write_bytes(content)
            problem = target.check(target.read(folder / name))
            assert not problem, f"the valid {name}: {problem}"


def _limit_memory() -> Callable[[], float]:
    """Limits the addresses; gives a function that tells the growth of the pages, in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    used = pages * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, used + _MOST_ADDRESSES))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return lambda: (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e3


def _one_case(
    target: Target, folder: Path, case: int, watch: "_AuditHook", counts: collections.Counter
) -> str | None:
    """Does a case; returns what it did wrong.

    A library that believes a header asks for memory which it then cannot fill. That costs nothing
    but addresses, so a case that ran out of them is done again with more: then its pages count.
    """
    rng = np.random.default_rng([SEED, case])
    name = _one_of(rng, target.mutations)
    content = target.mutations[name](rng, target.files[name])
    path = folder / name
    path.write_bytes(content)
    kind, problem = _read(target, path, folder, watch)
    if kind == "memory":
        limit, most = resource.getrlimit(resource.RLIMIT_AS)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        kind, problem = _read(target, path, folder, watch)
        resource.setrlimit(resource.RLIMIT_AS, (limit, most))
        growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        if growth * 1000 > MEMORY_BYTES / 2:
            problem = f"filled {growth / 1000:.0f} MB: {problem}"
    path.write_bytes(target.files[name][0])
    counts["refused" if kind == "memory" else kind] += not problem
    return problem


def _read(target: Target, path: Path, folder: Path, watch: "_AuditHook") -> tuple[str, str | None]:
    """Reads; returns "accepted", "refused" or "memory", and what was wrong."""
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    try:
        with watch:
            found = target.read(path)
        kind, problem = "accepted", target.check(found)
    except Exception as error:
        chain: list[BaseException | None] = [error]
        while chain[-1] is not None and len(chain) < 50:
            chain.append(chain[-1].__cause__ or chain[-1].__context__)
        kind = "memory" if any(isinstance(e, MemoryError) for e in chain) else "refused"
        problem = _fault(error, folder)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    return kind, "; ".join(watch.taken()) or problem


def _fault(error: Exception, folder: Path) -> str | None:
    """What is wrong with an error, None if it is one that is documented."""
    short = "".join(traceback.format_exception(error))[-3000:]
    ours = type(error).__module__.startswith("diffpose_jax")
    if not ours and type(error) not in (ValueError, FileNotFoundError):
        return f"an error that is not documented: {short}"
    if str(folder) not in str(error):
        return f"the message does not name the file: {short}"
    if len(str(error)) > LONGEST_MESSAGE:
        return f"a message of {len(str(error)):,} characters: {str(error)[:200]}"
    return None


class _AuditHook:
    """Notes what no reader may do: run something, talk to the network, write, remove."""

    _NEVER = frozenset(
        {
            "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty",
            "os.startfile", "subprocess.Popen", "pty.spawn", "socket.connect", "socket.bind",
            "socket.getaddrinfo", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link",
            "os.symlink", "os.chmod", "os.chown", "os.truncate", "shutil.rmtree",
        }
    )  # fmt: skip
    _WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    _ARRAYS = frozenset({"ndarray", "dtype", "_reconstruct", "_frombuffer"})

    def __init__(self) -> None:
        self._seen: list[str] = []
        self._on = False
        sys.addaudithook(self._note)

    def _note(self, event: str, args: tuple) -> None:
        if not self._on:
            return
        is_wrong = event in self._NEVER
        if event == "open":
            path, _, flags = args
            is_wrong = bool(flags & self._WRITING) and path != os.devnull
        elif event == "exec":
            # Modules, and the methods that dataclasses and named tuples write for themselves.
            files = args[0].co_filename, sys._getframe(1).f_code.co_filename
            is_wrong = not files[0].endswith(".py") and not files[1].startswith(_STANDARD_LIBRARY)
        elif event == "pickle.find_class":
            module, name = args
            is_wrong = not (module.startswith("numpy") and name in self._ARRAYS)
        if is_wrong:
            self._seen.append(f"{event} {args!r}"[:500])

    def __enter__(self) -> None:
        self._on = True

    def __exit__(self, *_: object) -> None:
        self._on = False

    def taken(self) -> list[str]:
        seen, self._seen = self._seen, []
        return seen


def reproduce(target: Target, case: int, folder: Path) -> Path:
    """Writes the folder of a case; returns the path to read."""
    for file, contents in target.files.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(contents[0])
    rng = np.random.default_rng([SEED, case])
    name = _one_of(rng, target.mutations)
    with contextlib.suppress(FileNotFoundError):
        (folder / name).unlink()
    (folder / name).write_bytes(target.mutations[name](rng, target.files[name]))
    return folder / name
