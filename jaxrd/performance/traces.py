"""Where the time of a compiled program goes, read from a trace of JAX's profiler and from the program's own text.

A trace names instructions of the compiled program (`fusion.12`); the text of that program says what each of them computes and,
in its metadata, which line of the traced function it comes from and in which named scopes. Both are text: nothing here runs.

What a trace does not say. On CPU the event of a large convolution may end at once, while a pool of threads works on, beside
which other instructions run: time in which no event runs is counted as that of the last convolution or product that was
started, and stated apart, for which one of several in flight it was is not known. Elsewhere time without an event is time in
which the device has nothing to do.
"""

import collections
import dataclasses
import gzip
import json
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxrd.errors import InputError
from jaxrd.training.step import SCOPES

ELSEWHERE = "elsewhere"

_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?(?P<name>[\w.\-]+) = (?P<rest>.*)$")
_OPCODE = re.compile(r"(?:^|[\s)}\]])([a-z][a-z0-9\-]*)\(")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?(?P<name>[\w.\-]+) \(.*\{\s*$")
_OPERAND = re.compile(r"[(\s]%([\w.\-]+)(?=[,)])")
_CALLED = re.compile(r"(?:calls|to_apply|called_computations)=\{?%?([\w.\-]+)")
_COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter", "collective-broadcast")
_MOVES = {"copy", "copy-start", "copy-done", "transpose", "bitcast", "reshape", "pad", "slice", "concatenate", "convert",
          "broadcast", "dynamic-slice", "dynamic-update-slice", "reverse", "iota"}
_REDUCTIONS = {"reduce", "reduce-window", "select-and-scatter"}
_CONTROL = {"while", "conditional", "call", "async-start", "async-done"}
_NO_WORK = {"parameter", "constant", "tuple", "get-tuple-element"}
# Whose work may go on in a pool of threads when their event has ended.
_POOLED = ("convolution", "dot")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """An instruction of a compiled program.

    Attributes:
      kind: "convolution", "dot", "collective", "reduction", "copy or transpose", "elementwise", "control" or "other".
      scope: the outermost of the scopes that it lies in; "elsewhere" where it lies in none.
      op_name: what it was traced from: "jit(train_step)/attack/conv_general_dilated".
    """

    kind: str
    scope: str
    op_name: str


@dataclasses.dataclass(frozen=True)
class Event:
    """An instruction that ran.

    Attributes:
      instruction: its name.
      start, end: in seconds.
      lane: process and thread, or stream, that it ran on.
    """

    instruction: str
    start: float
    end: float
    lane: tuple


@dataclasses.dataclass(frozen=True)
class Summary:
    """Where the time went, in seconds over all steps that were traced.

    Attributes:
      wall: from the first event of a step to its last, over the steps.
      covered: of it, in which an event ran.
      pooled: of the rest, counted as convolutions' and products', whose work goes on in a pool of threads (on CPU).
      by_scope, by_kind: seconds of events by what they are of, the longest first; what ran at once counts for each.
      top: (instruction, seconds, how often, Instruction) of the longest.
    """

    wall: float
    covered: float
    pooled: float
    by_scope: dict[str, float]
    by_kind: dict[str, float]
    top: list[tuple[str, float, int, Instruction]]


def instructions(program: str, scopes: Sequence[str] = SCOPES) -> dict[str, Instruction]:
    """Returns the instructions of a compiled program by name, those inside of fusions too.

    Args:
      program: `compiled.as_text()`.
      scopes: the names to look for.
    """
    bodies: dict[str, list[tuple[str, str, str]]] = collections.defaultdict(list)
    computation = ""
    for line in program.splitlines():
        if match := _COMPUTATION.match(line):
            computation = match["name"]
        elif (match := _INSTRUCTION.match(line)) and (opcode := _OPCODE.search(match["rest"])):
            bodies[computation].append((match["name"], opcode[1], match["rest"]))
    found: dict[str, Instruction] = {}
    for body in bodies.values():
        for name, opcode, rest in body:
            one = _instruction(opcode, rest, bodies, scopes)
            if one.scope == ELSEWHERE and not one.op_name:  # made by the compiler, of what it reads
                read = [found[other].scope for other in _OPERAND.findall(rest) if other in found]
                scopes_read = collections.Counter(scope for scope in read if scope != ELSEWHERE)
                if scopes_read:
                    one = dataclasses.replace(one, scope=scopes_read.most_common(1)[0][0])
            found[name] = one
    return found


def _instruction(opcode, rest, bodies, scopes) -> Instruction:
    inside = [one for one in _inside(opcode, rest, bodies) if one[1] not in _NO_WORK]
    own, *others = (_op_name(text) for text in (rest, *(one[2] for one in inside)))
    scope = scope_of(own, scopes)
    if scope == ELSEWHERE:  # a fusion that the compiler made of several has the name of one, or none
        found = [other for name in others if (other := scope_of(name, scopes)) != ELSEWHERE]
        scope = collections.Counter(found).most_common(1)[0][0] if found else ELSEWHERE
    return Instruction(_kind(opcode, rest, [one[1] for one in inside]), scope, own or next(filter(None, others), ""))


def _inside(opcode, rest, bodies) -> list[tuple[str, str, str]]:
    """Returns the instructions that a fusion, or a call, is made of."""
    called = _CALLED.search(rest) if opcode in ("fusion", "call", "async-start", "custom-call") else None
    return [inner for one in bodies.get(called[1], []) for inner in (one, *_inside(*one[1:], bodies))] if called else []


def _op_name(rest: str) -> str:
    match = re.search(r'op_name="([^"]*)"', rest)
    return match[1] if match else ""


def scope_of(op_name: str, scopes: Sequence[str] = SCOPES) -> str:
    """Returns the outermost of the scopes in a name such as "jit(step)/transpose(jvp(student))/add"."""
    match = re.search(rf"(?:^|[/(])({'|'.join(map(re.escape, scopes))})(?=[/)]|$)", op_name)
    return match[1] if match else ELSEWHERE


def _kind(opcode: str, rest: str, inside: list[str]) -> str:
    if opcode.startswith(_COLLECTIVES):
        return "collective"
    if opcode == "custom-call":
        target = (re.search(r'custom_call_target="([^"]*)"', rest) or ["", ""])[1].lower()
        return "convolution" if "conv" in target else "dot" if re.search("gemm|matmul|dot|cublas", target) else "other"
    if opcode == "fusion":
        for kind, opcodes in (("convolution", {"convolution"}), ("dot", {"dot"}), ("reduction", _REDUCTIONS)):
            if opcodes & set(inside):
                return kind
        if "triton_gemm" in rest:
            return "dot"
        if any(other.startswith(_COLLECTIVES) for other in inside):
            return "collective"
        return "copy or transpose" if inside and set(inside) <= _MOVES else "elementwise"
    if opcode in ("convolution", "dot"):
        return opcode
    if opcode in _REDUCTIONS:
        return "reduction"
    if opcode in _MOVES:
        return "copy or transpose"
    if opcode in _CONTROL:
        return "control"
    return "other" if opcode in ("sort", "rng", "rng-bit-generator", "scatter", "gather", "fft", "cholesky") else "elementwise"


def read(directory: str | pathlib.Path) -> dict[str, Any]:
    """Returns the newest trace below a directory that `jax.profiler.trace` has written, as its JSON is.

    Raises:
      InputError: there is none.
    """
    files = sorted(pathlib.Path(directory).rglob("*.trace.json.gz"), key=lambda path: path.stat().st_mtime)
    if not files:
        raise InputError(f"{directory} holds no *.trace.json.gz, which JAX's profiler writes; name the directory it was given")
    with gzip.open(files[-1], "rt", encoding="utf-8") as file:
        return json.load(file)


def events(trace: Mapping[str, Any], known: Iterable[str]) -> list[Event]:
    """Returns the instructions that ran, of a trace as `read` gives it, in the order of their start.

    Where a trace shows the same work twice, as streams of a GPU and once more as derived lines, the streams count; where
    devices are in it, what a host's threads say of the same program does not.

    Args:
      trace: {"traceEvents": [...]}, times in microseconds.
      known: names of the program's instructions; others, of other programs, are left out.
    """
    processes, threads = {}, {}
    for entry in trace["traceEvents"]:
        if entry.get("ph") == "M" and entry["name"] == "process_name":
            processes[entry["pid"]] = entry["args"]["name"]
        elif entry.get("ph") == "M" and entry["name"] == "thread_name":
            threads[entry["pid"], entry["tid"]] = entry["args"]["name"]
    known, found = set(known), collections.defaultdict(list)
    for entry in trace["traceEvents"]:
        if entry.get("ph") != "X":
            continue
        lane = entry["pid"], entry.get("tid")
        on_device, line = "/device:" in processes.get(lane[0], ""), threads.get(lane, "")
        name = entry.get("args", {}).get("hlo_op") or (entry["name"] if on_device and line == "XLA Ops" else None)
        if name not in known:
            continue
        rank = (on_device, line.startswith("Stream"), line == "XLA Ops") if on_device else (False, False, False)
        found[rank].append(Event(name, entry["ts"] / 1e6, (entry["ts"] + entry.get("dur", 0.0)) / 1e6, lane))
    return sorted(found[max(found)], key=lambda event: (event.start, -event.end)) if found else []


def windows(trace: Mapping[str, Any], name: str) -> list[tuple[float, float]]:
    """Returns (start, end) in seconds of the annotations of that name (`jax.profiler.StepTraceAnnotation`)."""
    return [(entry["ts"] / 1e6, (entry["ts"] + entry.get("dur", 0.0)) / 1e6) for entry in trace["traceEvents"]
            if entry.get("ph") == "X" and entry.get("name") == name]


def summarise(
    ran: Sequence[Event], known: Mapping[str, Instruction], steps: Sequence[tuple[float, float]] = (), *,
    pooled: bool = False, top: int = 10,
) -> Summary:
    """Returns where the time of a trace went.

    Args:
      ran: the events, as `events` gives them.
      known: the program's instructions.
      steps: (start, end) of each step; without, all is one step.
      pooled: count time without an event as that of the last convolution or product that was started: on CPU.
      top: how many instructions to list.
    """
    seconds, times = collections.Counter(), collections.Counter()
    for event, own in zip(ran, _own_times(ran), strict=True):
        seconds[event.instruction] += own
        times[event.instruction] += 1
    wall = covered = waiting = 0.0
    for start, end in steps or [(float("-inf"), float("inf"))]:
        inside = [event for event in ran if start <= event.start < end]
        if not inside:
            continue
        wall += max(event.end for event in inside) - inside[0].start
        reached, working = inside[0].start, None
        for event in inside:
            gap = event.start - reached
            if gap > 0 and working:
                seconds[working] += gap
                waiting += gap
            covered += max(0.0, event.end - max(reached, event.start))
            reached = max(reached, event.end)
            if pooled and known[event.instruction].kind in _POOLED:
                working = event.instruction
    by_scope, by_kind = collections.Counter(), collections.Counter()
    for name, own in seconds.items():
        by_scope[known[name].scope] += own
        by_kind[known[name].kind] += own
    return Summary(wall, covered, waiting, dict(by_scope.most_common()), dict(by_kind.most_common()),
                   [(name, own, times[name], known[name]) for name, own in seconds.most_common(top)])


def _own_times(ran: Sequence[Event]) -> list[float]:
    """Returns the seconds of each event without those of the events that lie inside it on the same lane, as in a loop's."""
    own, open_events = [event.end - event.start for event in ran], collections.defaultdict(list)
    for index, event in enumerate(ran):
        stack = open_events[event.lane]
        while stack and ran[stack[-1]].end <= event.start:
            stack.pop()
        if stack and event.end <= ran[stack[-1]].end:
            own[stack[-1]] -= event.end - event.start
        stack.append(index)
    return own
